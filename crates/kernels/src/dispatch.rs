//! Which experts the tokens of a micro-batch go to, and in which order their rows lie.

use std::sync::Arc;

use crate::on_device::OnDevice;

/// The rows of a micro-batch's products with experts: one row for each token and each of its `k`
/// experts. The rows of an expert follow each other, in the order of their tokens. Cheap to clone.
///
/// It depends on the choices alone: neither threads nor ranks change the order of any sum.
#[derive(Clone, Debug)]
pub struct Dispatch {
    /// [t · k]: the token of each row.
    pub(crate) tokens: Arc<[u32]>,
    /// [t, k]: the row of each choice of each token.
    pub(crate) rows: Arc<[u32]>,
    /// [e + 1]: where the rows of each expert begin.
    pub(crate) starts: Arc<[u32]>,
    /// k
    pub(crate) choices: usize,
    #[cfg_attr(not(gpu_backend), expect(dead_code, reason = "GPUs only"))]
    pub(crate) tokens_on_device: OnDevice,
    #[cfg_attr(not(gpu_backend), expect(dead_code, reason = "GPUs only"))]
    pub(crate) rows_on_device: OnDevice,
}

impl Dispatch {
    /// The rows of tokens that have chosen `choices` of `experts` experts each: `chosen` [t, k].
    ///
    /// # Panics
    /// If an expert is beyond the last, or a token has chosen too few.
    pub fn new(chosen: &[u32], choices: usize, experts: usize) -> Dispatch {
        assert!(choices > 0 && chosen.len().is_multiple_of(choices), "choices of each token");
        let mut starts = vec![0; experts + 1];
        for &expert in chosen {
            starts[expert as usize + 1] += 1;
        }
        for expert in 0..experts {
            starts[expert + 1] += starts[expert];
        }
        let mut next = starts.clone();
        let (mut tokens, mut rows) = (vec![0; chosen.len()], vec![0; chosen.len()]);
        for (choice, &expert) in chosen.iter().enumerate() {
            let row = next[expert as usize];
            next[expert as usize] += 1;
            rows[choice] = row;
            tokens[row as usize] = (choice / choices) as u32;
        }
        Dispatch {
            tokens: tokens.into(),
            rows: rows.into(),
            starts: starts.into(),
            choices,
            tokens_on_device: OnDevice::default(),
            rows_on_device: OnDevice::default(),
        }
    }

    /// The number of rows, t · k.
    pub(crate) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// The expert of each row.
    pub fn experts(&self) -> impl Iterator<Item = usize> {
        self.used().flat_map(|(expert, rows)| rows.map(move |_| expert))
    }

    /// The rows of each expert that has any: (expert, rows).
    pub(crate) fn used(&self) -> impl Iterator<Item = (usize, std::ops::Range<usize>)> {
        let ranges = self.starts.windows(2).map(|pair| pair[0] as usize..pair[1] as usize);
        ranges.enumerate().filter(|(_, rows)| !rows.is_empty())
    }
}

/// How the scores of a token's experts become the weights of their outputs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExpertWeights {
    /// What makes scores of the router's logits.
    pub scores: Scores,
    /// Whether the weights are divided by their sum, to which this is added.
    pub normalized: Option<f32>,
    /// What they are multiplied by at the end.
    pub scale: f32,
}

/// What makes scores of a router's logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scores {
    /// Their softmax over all experts (Fedus et al. 2021, "Switch Transformers").
    Softmax,
    /// The logistic function of each (DeepSeek-AI 2024, "DeepSeek-V3").
    Sigmoid,
}

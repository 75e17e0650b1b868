//! The tensors of an adapter's file whose experts have one branch for all of a layer (gpt-oss).
//!
//! What is trained has a branch for each expert. In the file their A lie one below the other, [e · r, i], and
//! their B side by side, [o, r · e] by rank: as PEFT has the branch of a parameter.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use crate::adaptation::{is_expert, stack_of};
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::layout::{Layout, Parameter};

/// A tensor of the file.
#[derive(Debug)]
struct FileTensor {
    name: String,
    shape: Vec<usize>,
    /// Where its elements are in the flat vector: of one tensor, or of that of each expert.
    parts: Vec<Range<usize>>,
    /// Of each expert's B, [o, r]. `None`: its parts lie one behind the other.
    by_rank: Option<[usize; 2]>,
}

/// The tensors of the file, in its order.
#[derive(Debug)]
pub(super) struct FileLayout {
    tensors: Vec<FileTensor>,
    /// Elements of the flat vector.
    len: usize,
}

/// A parameter of an expert's branch: that of the stack, such as `base_model.model.model.layers.0.mlp.experts`
/// and `down_proj`, and the half.
fn place(name: &str) -> Option<(String, String, &str)> {
    let (module, half) = name.strip_suffix(".weight")?.rsplit_once('.').filter(|_| is_expert(name))?;
    let stack = stack_of(module);
    let (experts, part) = stack.rsplit_once('.').filter(|_| stack != module)?;
    Some((experts.to_owned(), part.to_owned(), half))
}

impl FileLayout {
    /// Of these trained parameters. `None`: the file has them as they are.
    ///
    /// # Errors
    /// [`ModelError::NotExpressible`] if the experts of a layer have branches of several shapes, or only some of
    /// them have one.
    pub(super) fn of(layout: &Layout, config: &ModelConfig) -> Result<Option<FileLayout>, ModelError> {
        let Some(experts) = config.experts.as_ref().filter(|_| config.family.has_expert_parameters()) else {
            return Ok(None);
        };
        // PEFT wraps the module once for each of its parameters, `down_proj` last.
        let wrapped_twice: BTreeSet<String> =
            layout.iter().filter_map(|p| place(&p.name)).filter(|p| p.1 == "down_proj").map(|p| p.0).collect();
        let mut tensors: Vec<FileTensor> = Vec::new();
        let mut stacks: BTreeMap<String, usize> = BTreeMap::new();
        for Parameter { name, shape, range } in layout.iter() {
            let Some((module, part, half)) = place(name) else {
                let (name, shape, parts) = (name.clone(), shape.clone(), vec![range.clone()]);
                tensors.push(FileTensor { name, shape, parts, by_rank: None });
                continue;
            };
            let inner = if part != "down_proj" && wrapped_twice.contains(&module) { ".base_layer" } else { "" };
            let stack = format!("{module}{inner}.{half}.weight");
            let (one, by_rank) = ([shape[0], shape[1]], half == "lora_B");
            let number = *stacks.entry(stack.clone()).or_insert_with(|| {
                let [rows, columns] = one;
                let shape =
                    if by_rank { vec![rows, columns * experts.count] } else { vec![experts.count * rows, columns] };
                let by_rank = by_rank.then_some(one);
                tensors.push(FileTensor { name: stack, shape, parts: Vec::new(), by_rank });
                tensors.len() - 1
            });
            tensors[number].parts.push(range.clone());
        }
        let is_whole = |number: &usize| {
            let FileTensor { shape, parts, .. } = &tensors[*number];
            let each = shape.iter().product::<usize>() / experts.count;
            parts.len() == experts.count && parts.iter().all(|part| part.len() == each)
        };
        match stacks.iter().find(|(_, number)| !is_whole(number)) {
            None => Ok(Some(FileLayout { tensors, len: layout.len() })),
            Some((name, _)) => Err(ModelError::NotExpressible {
                what: format!("PEFT has one branch for all experts: those of `{name}` differ"),
                hint: "--format merged writes the model with them".to_owned(),
            }),
        }
    }

    pub(super) fn layout(&self) -> Layout {
        let mut layout = Layout::default();
        for tensor in &self.tensors {
            layout.push(tensor.name.clone(), tensor.shape.clone());
        }
        layout
    }

    /// The flat values in the order of the file.
    pub(super) fn put_together(&self, values: &[f32]) -> Vec<f32> {
        let mut in_file = Vec::with_capacity(self.len);
        for FileTensor { parts, by_rank, .. } in &self.tensors {
            match *by_rank {
                None => parts.iter().for_each(|part| in_file.extend_from_slice(&values[part.clone()])),
                Some([rows, columns]) => {
                    for element in 0..rows * columns {
                        in_file.extend(parts.iter().map(|part| values[part.start + element]));
                    }
                }
            }
        }
        in_file
    }

    /// The opposite of [`FileLayout::put_together`].
    pub(super) fn take_apart(&self, in_file: &[f32]) -> Vec<f32> {
        let (mut values, mut rest) = (vec![0.0; self.len], in_file.iter());
        for FileTensor { parts, by_rank, .. } in &self.tensors {
            match *by_rank {
                None => {
                    for part in parts {
                        values[part.clone()].iter_mut().zip(&mut rest).for_each(|(value, from)| *value = *from);
                    }
                }
                Some([rows, columns]) => {
                    for element in 0..rows * columns {
                        parts.iter().zip(&mut rest).for_each(|(part, from)| values[part.start + element] = *from);
                    }
                }
            }
        }
        values
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Two experts of a model of two, rank 2, two inputs and three outputs. (expert, half, elements)
    #[test]
    fn values_are_put_together_and_taken_apart() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models/gpt_oss_experts");
        let mut config = ModelConfig::load(&directory).expect("a config");
        config.experts.as_mut().expect("experts").count = 2;
        let mut layout = Layout::default();
        let module = "base_model.model.model.layers.0.mlp.experts";
        layout.push("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight".to_owned(), vec![1, 2]);
        for expert in 0..2 {
            for part in ["gate_up_proj", "down_proj"] {
                layout.push(format!("{module}.{expert}.{part}.lora_A.weight"), vec![2, 2]);
                layout.push(format!("{module}.{expert}.{part}.lora_B.weight"), vec![3, 2]);
            }
        }
        let file = FileLayout::of(&layout, &config).expect("whole stacks").expect("stacks");
        let found: Vec<_> = file.layout().iter().map(|p| (p.name.clone(), p.shape.clone())).collect();
        let want = [
            ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight".to_owned(), vec![1, 2]),
            (format!("{module}.base_layer.lora_A.weight"), vec![4, 2]),
            (format!("{module}.base_layer.lora_B.weight"), vec![3, 4]),
            (format!("{module}.lora_A.weight"), vec![4, 2]),
            (format!("{module}.lora_B.weight"), vec![3, 4]),
        ];
        assert_eq!(found, want);
        // Of expert 0 the elements 2 to 21, of expert 1 those from 22 on.
        let values: Vec<f32> = (0..42).map(|n| n as f32).collect();
        let in_file = file.put_together(&values);
        assert_eq!(in_file[..10], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 22.0, 23.0, 24.0, 25.0]);
        assert_eq!(in_file[10..16], [6.0, 26.0, 7.0, 27.0, 8.0, 28.0]);
        assert_eq!(file.take_apart(&in_file), values);
        config.experts.as_mut().expect("experts").count = 3;
        let error = FileLayout::of(&layout, &config).expect_err("an expert without a branch").to_string();
        assert!(error.contains("one branch for all experts"), "{error}");
    }
}

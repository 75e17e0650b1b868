//! The tokens that were chosen from the logits of a pass.
//!
//! Where several processes hold the layers, the last one has the logits. It chooses, and tells the others the tokens:
//! five bytes for each row, and eight for each logarithm of a probability that was asked for. So rules, seeds and forms
//! are followed by one process, and the others take what it says. With a slice of every layer on each, all processes
//! have the logits and choose for themselves.
//!
//! A message has a length that all processes know. Only the words of a form that has failed come in a second one.

use rayon::prelude::*;

use crate::error::ModelError;
use crate::model::Model;
use crate::passes::generate::next_token;
use crate::passes::sampling::Sampling;
use crate::passes::token_rules::{ChosenToken, Logprobs};

/// What was chosen of a row. `None`: nothing was asked of it.
pub(crate) type Choice = Option<Result<ChosenToken, ModelError>>;

/// What was chosen of each row of a pass, or where it comes from.
#[must_use = "each process takes what the last one has sent"]
#[derive(Debug)]
pub(crate) enum Chosen {
    /// This.
    Here(Vec<Choice>),
    /// The process of the last layer says it: of each row, with so many of the likeliest tokens if logarithms of
    /// probabilities are wanted.
    ByLast(Vec<Option<usize>>),
}

/// What the first byte of a row says.
const NOTHING: u8 = 0;
const TOKEN: u8 = 1;
/// Behind it is how many tokens were generated before.
const NOT_A_NUMBER: u8 = 2;
/// Behind it is the length of the words why.
const FAILED: u8 = 3;

impl Model {
    /// Whether this process has the logits of its passes, and chooses tokens. Where several hold the layers, the one of
    /// the last layer does.
    pub fn chooses(&self) -> bool {
        self.placement().stage().is_none_or(|stage| stage.mine == stage.last())
    }

    /// Chooses from logits, if this process has them, and tells the others. `rows`: of each row, how many of the
    /// likeliest tokens are wanted. `pick`: what chooses, in the order of the rows.
    pub(crate) fn choose(
        &self,
        logits: Option<&[f32]>,
        rows: Vec<Option<usize>>,
        pick: impl FnOnce(&[f32]) -> Vec<Choice>,
    ) -> Result<Chosen, ModelError> {
        let Some(logits) = logits else { return Ok(Chosen::ByLast(rows)) };
        let choices = pick(logits);
        if self.weights.has_others() {
            let (bytes, words) = encoded(&choices, &rows, self.config.vocabulary);
            self.weights.tell_others(&bytes)?;
            if !words.is_empty() {
                self.weights.tell_others(words.as_bytes())?;
            }
        }
        Ok(Chosen::Here(choices))
    }

    /// As [`Self::choose`], of rows with so many tokens before each that are chosen by [`Sampling`] alone.
    pub(crate) fn choose_rows(&self, logits: Option<&[f32]>, rows: &[(Sampling, usize)]) -> Result<Chosen, ModelError> {
        self.choose(logits, vec![None; rows.len()], |logits| {
            let of_row = |(logits, &(sampling, generated)): (&[f32], &(Sampling, usize))| {
                Some(next_token(logits, sampling, generated).map(ChosenToken::from))
            };
            logits.par_chunks(logits.len() / rows.len()).zip(rows).map(of_row).collect()
        })
    }

    /// What was chosen. Where another process chooses, this is done in the order in which the passes were begun.
    pub(crate) fn taken(&self, chosen: Chosen) -> Result<Vec<Choice>, ModelError> {
        let rows = match chosen {
            Chosen::Here(choices) => return Ok(choices),
            Chosen::ByLast(rows) => rows,
        };
        let vocabulary = self.config.vocabulary;
        let bytes = self.weights.hear_last(rows.iter().map(|top| width(*top, vocabulary)).sum())?;
        let mut rest = Rest(&bytes);
        let read: Vec<Row> = rows.iter().map(|top| rest.row(top.map(|top| top.min(vocabulary)))).collect();
        let length: usize = read.iter().map(|row| if row.kind == FAILED { row.number as usize } else { 0 }).sum();
        let words = if length > 0 { self.weights.hear_last(length)? } else { Vec::new() };
        let mut words = Rest(&words);
        Ok(read.into_iter().map(|row| row.choice(&mut words)).collect())
    }

    /// Takes in what the last process says of a pass, before it is needed.
    pub(crate) fn hear(&self, chosen: &mut Chosen) -> Result<(), ModelError> {
        let said = std::mem::replace(chosen, Chosen::Here(Vec::new()));
        *chosen = Chosen::Here(self.taken(said)?);
        Ok(())
    }

    /// The tokens that were chosen, up to the first row of which none was.
    pub(crate) fn tokens_of(&self, chosen: Chosen) -> Result<Vec<u32>, ModelError> {
        let tokens = self.taken(chosen)?.into_iter().map_while(|choice| choice);
        tokens.map(|chosen| chosen.map(|chosen| chosen.token)).collect()
    }
}

/// Bytes of a row: what it is, a number, and the logarithms of probabilities.
fn width(top: Option<usize>, vocabulary: usize) -> usize {
    5 + top.map_or(0, |top| 4 + 8 * top.min(vocabulary))
}

/// The bytes of all rows, and the words of those that have failed.
fn encoded(choices: &[Choice], rows: &[Option<usize>], vocabulary: usize) -> (Vec<u8>, String) {
    let (mut bytes, mut words) = (Vec::new(), String::new());
    for (n, top) in rows.iter().enumerate() {
        let end = bytes.len() + width(*top, vocabulary);
        let choice = choices.get(n).and_then(Option::as_ref);
        let (kind, number) = match choice {
            None => (NOTHING, 0),
            Some(Ok(chosen)) => (TOKEN, chosen.token),
            Some(Err(ModelError::NotANumber { generated })) => (NOT_A_NUMBER, *generated as u32),
            Some(Err(error)) => {
                let before = words.len();
                match error {
                    ModelError::Form { what } => words.push_str(what),
                    other => words.push_str(&other.to_string()),
                }
                (FAILED, (words.len() - before) as u32)
            }
        };
        bytes.push(kind);
        bytes.extend(number.to_le_bytes());
        if let Some(Ok(ChosenToken { logprobs: Some(logprobs), .. })) = choice {
            bytes.extend(logprobs.chosen.to_le_bytes());
            for (token, logprob) in &logprobs.top {
                bytes.extend(token.to_le_bytes());
                bytes.extend(logprob.to_le_bytes());
            }
        }
        bytes.resize(end, 0);
    }
    (bytes, words)
}

/// A row as it was sent.
struct Row {
    kind: u8,
    number: u32,
    logprobs: Option<Logprobs>,
}

impl Row {
    fn choice(self, words: &mut Rest<'_>) -> Choice {
        match self.kind {
            NOTHING => None,
            TOKEN => Some(Ok(ChosenToken { token: self.number, logprobs: self.logprobs })),
            NOT_A_NUMBER => Some(Err(ModelError::NotANumber { generated: self.number as usize })),
            _ => {
                let what = String::from_utf8_lossy(words.take(self.number as usize)).into_owned();
                Some(Err(ModelError::Form { what }))
            }
        }
    }
}

/// Bytes that are not read yet. Their number is known, as it was asked for.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take(&mut self, length: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(length);
        self.0 = rest;
        taken
    }

    fn four(&mut self) -> [u8; 4] {
        self.take(4).try_into().expect("four bytes")
    }

    fn row(&mut self, top: Option<usize>) -> Row {
        let (kind, number) = (self.take(1)[0], u32::from_le_bytes(self.four()));
        let logprobs = top.map(|top| {
            let chosen = f32::from_le_bytes(self.four());
            let mut of_likely = || (u32::from_le_bytes(self.four()), f32::from_le_bytes(self.four()));
            Logprobs { chosen, top: (0..top).map(|_| of_likely()).collect() }
        });
        Row { kind, number, logprobs }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_is_what_comes() {
        let logprobs = |chosen, top: &[(u32, f32)]| Some(Logprobs { chosen, top: top.to_vec() });
        let choices: Vec<Choice> = vec![
            Some(Ok(ChosenToken::from(7))),
            None,
            Some(Ok(ChosenToken { token: 90, logprobs: logprobs(-1.5, &[(3, -0.25), (90, -1.5)]) })),
            Some(Err(ModelError::NotANumber { generated: 12 })),
            Some(Err(ModelError::Form { what: "nothing fits".to_owned() })),
            Some(Err(ModelError::Form { what: "ä".to_owned() })),
            Some(Ok(ChosenToken { token: 0, logprobs: logprobs(-2.0, &[]) })),
        ];
        // The vocabulary has two tokens, so of three that are wanted there are two.
        let (rows, vocabulary) = ([None, Some(1), Some(3), Some(0), None, Some(2), Some(0), None], 2);
        let (bytes, words) = encoded(&choices, &rows, vocabulary);
        assert_eq!(bytes.len(), rows.iter().map(|top| width(*top, vocabulary)).sum::<usize>());
        let (mut rest, mut words) = (Rest(&bytes), Rest(words.as_bytes()));
        let rows: Vec<Row> = rows.iter().map(|top| rest.row(top.map(|top| top.min(vocabulary)))).collect();
        let got: Vec<Choice> = rows.into_iter().map(|row| row.choice(&mut words)).collect();
        assert!(rest.0.is_empty() && words.0.is_empty(), "all is read");
        let said = |choices: &[Choice]| choices.iter().map(|choice| format!("{choice:?}")).collect::<Vec<_>>();
        assert_eq!(said(&got[..choices.len()]), said(&choices));
        assert!(got[choices.len()].is_none(), "a row that nothing was chosen of");
    }

    #[test]
    fn a_token_takes_five_bytes() {
        assert_eq!(encoded(&[Some(Ok(ChosenToken::from(150_000)))], &[None], 151_936).0.len(), 5);
    }
}

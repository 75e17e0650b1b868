//! What of an answer is reasoning. It stands at the beginning, between tags.

use crate::stops::beginning;
use crate::texts::REASONING as REASONING_TAGS;
use crate::thought::Prompted;

#[derive(Debug, PartialEq)]
enum State {
    /// Nothing but white space has come.
    Start,
    /// Until this tag.
    Within(&'static str),
    Behind,
}

/// Tells reasoning from the answer as the text comes. What may be the beginning of a tag is held
/// back.
pub struct Reasoning {
    state: State,
    held: String,
}

impl Reasoning {
    /// `opened`: the text that the template has put in front of the answer, from its tag on.
    pub fn new(opened: Option<&str>) -> Reasoning {
        let tags = REASONING_TAGS.iter().find(|(open, _)| opened.is_some_and(|text| text.starts_with(open)));
        Reasoning { state: tags.map_or(State::Start, |&(_, close)| State::Within(close)), held: String::new() }
    }

    /// The parts that may be shown once this text has come, each with whether it is reasoning. Tags
    /// belong to the reasoning.
    pub fn push(&mut self, new: &str) -> Vec<(String, bool)> {
        self.held += new;
        let mut parts = Vec::new();
        if self.state == State::Start {
            let text = self.held.trim_start();
            match REASONING_TAGS.iter().find(|(open, _)| text.starts_with(open)) {
                Some(&(_, close)) => self.state = State::Within(close),
                None if REASONING_TAGS.iter().any(|(open, _)| open.starts_with(text)) => return parts,
                None => self.state = State::Behind,
            }
        }
        if let State::Within(close) = self.state {
            let end = self.held.find(close).map(|start| start + close.len());
            let shown = end.unwrap_or_else(|| self.held.len() - beginning(&self.held, close));
            let rest = self.held.split_off(shown);
            parts.push((std::mem::replace(&mut self.held, rest), true));
            if end.is_some() {
                self.state = State::Behind;
            }
        }
        if self.state == State::Behind {
            parts.push((std::mem::take(&mut self.held), false));
        }
        parts.retain(|(text, _)| !text.is_empty());
        parts
    }

    /// What was held back, once nothing more comes.
    pub fn finish(&mut self) -> Option<(String, bool)> {
        let is_reasoning = matches!(self.state, State::Within(_));
        Some((std::mem::take(&mut self.held), is_reasoning)).filter(|(text, _)| !text.is_empty())
    }
}

/// The end of a prompt from a tag that opens reasoning, if it ends with one.
pub fn opened_by(prompt: &str) -> Option<&str> {
    let opened = Prompted::at_end(prompt).filter(|prompted| !prompted.is_closed)?;
    Some(&prompt[opened.start..])
}

#[cfg(test)]
mod tests {
    use super::*;

    type Part = (String, bool);

    /// (what the template opened, pieces, reasoning, answer)
    #[test]
    fn reasoning_is_told_from_the_answer() {
        for (opened, pieces, reasoning, answer) in [
            (None, &["Hel", "lo"][..], "", "Hello"),
            (None, &["<think>", "\nhm", "\n</think>", "\n\nHello"], "<think>\nhm\n</think>", "\n\nHello"),
            (None, &["\n<thi", "nk>hm</th", "ink>Hi"], "\n<think>hm</think>", "Hi"),
            (None, &["[THI", "NK]hm[/THINK]Hi"], "[THINK]hm[/THINK]", "Hi"),
            (None, &["<", "b>bold"], "", "<b>bold"),
            (None, &["Say <think> now"], "", "Say <think> now"),
            (None, &["<thi"], "", "<thi"),
            (None, &["<think>never", " done </th"], "<think>never done </th", ""),
            (Some("<think>\n"), &["hm\n", "</think>", "Hi</think>"], "hm\n</think>", "Hi</think>"),
            (None, &["  "], "", "  "),
        ] {
            let mut through = Reasoning::new(opened);
            let mut parts: Vec<Part> = pieces.iter().flat_map(|piece| through.push(piece)).collect();
            parts.extend(through.finish());
            let of = |wanted: bool| -> String {
                parts.iter().filter(|(_, is)| *is == wanted).map(|(text, _)| text.as_str()).collect()
            };
            assert_eq!((of(true).as_str(), of(false).as_str()), (reasoning, answer), "{pieces:?}");
        }
    }

    #[test]
    fn prompts_that_open_reasoning() {
        for (prompt, want) in [
            ("<|im_start|>assistant\n<think>\n", Some("<think>\n")),
            ("<|im_start|>assistant\n", None),
            ("<think>\n\n</think>\n\n", None),
            ("[THINK]", Some("[THINK]")),
        ] {
            assert_eq!(opened_by(prompt), want, "{prompt}");
        }
    }
}

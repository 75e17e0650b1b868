//! Texts that end an answer, however tokens cut them up.

use std::borrow::Cow;

/// Passes text on until one of some texts comes up. What may be the beginning of one is held back.
pub struct Stops<'a> {
    stops: Cow<'a, [String]>,
    held: String,
    hit: bool,
}

impl<'a> Stops<'a> {
    /// None of the texts is empty.
    pub fn new(stops: impl Into<Cow<'a, [String]>>) -> Stops<'a> {
        Stops { stops: stops.into(), held: String::new(), hit: false }
    }

    /// Whether one of the texts has come.
    pub fn is_hit(&self) -> bool {
        self.hit
    }

    /// What may be shown once this text has come.
    pub fn push(&mut self, new: &str) -> String {
        if self.hit {
            return String::new();
        }
        self.held += new;
        if let Some(start) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.hit = true;
            self.held.truncate(start);
            return std::mem::take(&mut self.held);
        }
        let keep = self.stops.iter().map(|stop| beginning(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        std::mem::replace(&mut self.held, rest)
    }

    /// What was held back, once nothing more comes.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// How many bytes at the end of `text` are the beginning of `stop`.
pub fn beginning(text: &str, stop: &str) -> usize {
    let lengths = stop.char_indices().map(|(length, _)| length).skip(1);
    lengths.filter(|&length| text.ends_with(&stop[..length])).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::Stops;

    /// (stop texts, pieces, what is shown, whether one was hit)
    #[test]
    fn text_ends_before_the_first_stop_text() {
        type Case = (&'static [&'static str], &'static [&'static str], &'static str, bool);
        let cases: [Case; 8] = [
            (&[], &["a", "b"], "ab", false),
            (&["END"], &["one E", "N", "D two"], "one ", true),
            (&["END"], &["one E", "N", "X"], "one ENX", false),
            (&["END"], &["EEND"], "E", true),
            (&["\n\n", "x"], &["a\n", "b\n", "\nc"], "a\nb", true),
            (&["bc", "abcd"], &["abcd"], "", true),
            (&["é!"], &["caf", "é", "?"], "café?", false),
            (&["aab"], &["a", "a", "a", "b"], "a", true),
        ];
        for (stops, pieces, want, hit) in cases {
            let stops: Vec<String> = stops.iter().map(|stop| (*stop).to_owned()).collect();
            let mut through = Stops::new(&stops);
            let mut shown: String = pieces.iter().map(|piece| through.push(piece)).collect();
            shown += &through.finish();
            assert_eq!((shown.as_str(), through.is_hit()), (want, hit), "{stops:?} {pieces:?}");
        }
    }
}

//! Tokens that a text may go on with, looked up in the text itself: what followed the last tokens when they were
//! there before (Saxena 2023, "Prompt Lookup Decoding").

/// Most of the last tokens that are looked for, and fewest.
const LONGEST: usize = 4;
const SHORTEST: usize = 2;

/// Proposed tokens, and those among them that the model chose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Speculated {
    /// Tokens that went through the model before it was known whether they are chosen.
    pub proposed: u64,
    /// Those that were chosen.
    pub accepted: u64,
}

/// A text that goes on, and how far is looked ahead in it.
pub(crate) struct Lookup {
    text: Vec<u32>,
    /// Tokens that are proposed next.
    ahead: usize,
    most: usize,
}

impl Lookup {
    /// Proposes at most `most` tokens at a time.
    pub(crate) fn new(text: &[u32], most: usize) -> Lookup {
        // Without proposals the text is not needed.
        let text = if most == 0 { Vec::new() } else { text.to_vec() };
        Lookup { text, ahead: most, most }
    }

    /// A token was chosen.
    pub(crate) fn push(&mut self, token: u32) {
        if self.most > 0 {
            self.text.push(token);
        }
    }

    /// At most `room` tokens that may come next: those behind the last place where the longest end of the text was
    /// before. If the text ends before there are enough, it is gone on with what is proposed.
    pub(crate) fn propose(&self, room: usize) -> Vec<u32> {
        let count = self.ahead.min(room);
        if count == 0 {
            return Vec::new();
        }
        let length = self.text.len();
        let place = (SHORTEST..=LONGEST).rev().find_map(|n| {
            let (before, end) = (self.text.get(..length.checked_sub(1)?)?, self.text.get(length.checked_sub(n)?..)?);
            let place = before.windows(n).rposition(|tokens| tokens == end)?;
            Some(place + n)
        });
        let Some(place) = place else { return Vec::new() };
        let mut proposed: Vec<u32> = Vec::with_capacity(count);
        for next in place..place + count {
            proposed.push(if next < length { self.text[next] } else { proposed[next - length] });
        }
        proposed
    }

    /// Looks further ahead after a success, and less far after a failure: a wrong token costs a row of a pass.
    pub(crate) fn judge(&mut self, proposed: usize, accepted: usize) {
        if proposed > 0 {
            let ahead = if accepted == proposed { 2 * proposed } else { accepted.max(1) };
            self.ahead = ahead.min(self.most);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_followed_before_is_proposed() {
        for (text, most, room, want) in [
            (&[1, 2, 3, 4, 1, 2][..], 3, 9, &[3, 4, 1][..]),
            (&[1, 2, 3, 4, 1, 2], 3, 2, &[3, 4]),
            (&[1, 2, 3, 4, 1, 2], 0, 9, &[]),
            (&[1, 2, 3, 4, 1, 2], 3, 0, &[]),
            // The latest place, and the longest end.
            (&[1, 2, 3, 1, 2, 4, 1, 2], 1, 9, &[4]),
            (&[9, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2], 1, 9, &[3]),
            // One token is no end, and nothing was there before.
            (&[1, 5, 1], 3, 9, &[]),
            (&[1, 2, 3], 3, 9, &[]),
            (&[1], 3, 9, &[]),
            (&[], 3, 9, &[]),
            // Behind the end of the text it goes round.
            (&[7, 7, 7], 4, 9, &[7, 7, 7, 7]),
            (&[1, 2, 1, 2], 5, 9, &[1, 2, 1, 2, 1]),
        ] {
            assert_eq!(Lookup::new(text, most).propose(room), want, "{text:?} {most} {room}");
        }
    }

    #[test]
    fn success_decides_how_far_is_looked_ahead() {
        let mut lookup = Lookup::new(&[7; 9], 7);
        let count = |lookup: &mut Lookup, accepted: usize| {
            let proposed = lookup.propose(9).len();
            lookup.judge(proposed, accepted.min(proposed));
            proposed
        };
        let counts: Vec<usize> =
            [2, 0, 1, 9, 9, 9, 9].into_iter().map(|accepted| count(&mut lookup, accepted)).collect();
        assert_eq!(counts, [7, 2, 1, 2, 4, 7, 7]);
        lookup.judge(0, 0);
        assert_eq!(lookup.propose(9).len(), 7, "nothing was tried");
    }
}

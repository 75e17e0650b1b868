//! How far back layers with a window have to remember.
//!
//! A token sees the last `window` keys, its own with them. What lies further back is needed only if the text is taken
//! back: by proposed tokens that were not chosen, or by a prompt that begins as a part of the text.

use finetune_kernels::footprint::ATTENTION_BLOCK;

use super::room;
use crate::passes::generate::PROMPT_PART;
use crate::passes::generate_rows::MOST_AHEAD;

/// Tokens that a text which later prompts may begin as can be taken back by: two parts of a prompt. Behind a system
/// prompt another question of up to about so many tokens can come without reading it again.
const TAKEN_BACK: usize = 2 * PROMPT_PART;
/// Most tokens of a row in a pass that goes on with an answer.
const OF_A_PASS: usize = MOST_AHEAD + 1;
/// Longer texts than any memory holds are not told apart.
const LONGEST: usize = usize::MAX / 4;

/// What a text is kept for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum KeptFor {
    /// For going on with it. Only proposed tokens are taken back.
    GoingOn,
    /// For later prompts as well, which may begin as a part of it.
    #[default]
    LaterPrompts,
}

/// How far back a layer has to remember. Without a window that is everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reach {
    pub(crate) window: Option<usize>,
    kept_for: KeptFor,
}

impl Reach {
    pub(crate) fn new(window: Option<usize>, kept_for: KeptFor) -> Reach {
        Reach { window, kept_for }
    }

    /// The same of a text that only goes on.
    pub(crate) fn going_on(self) -> Reach {
        Reach { kept_for: KeptFor::GoingOn, ..self }
    }

    /// Of the places from `start` to before `end`, which are filled, the first that is still needed. As long as there
    /// is room for the next pass, nothing is forgotten: so most tokens cost no copy of the earlier ones. Whole blocks are
    /// forgotten, so that attention's sums keep their order.
    pub(crate) fn first(self, start: usize, end: usize) -> usize {
        match self.back() {
            Some(back) if end - start + OF_A_PASS > most_places(back) => {
                start.max(end.saturating_sub(back) / ATTENTION_BLOCK * ATTENTION_BLOCK)
            }
            _ => start,
        }
    }

    /// Places that are held of a text of so many tokens, with the room behind them: at most these.
    pub(crate) fn places(self, tokens: usize) -> usize {
        let all = room(tokens.min(LONGEST));
        self.back().map_or(all, |back| all.min(most_places(back)))
    }

    /// Places in front of the next token that may be asked for.
    fn back(self) -> Option<usize> {
        let taken_back = match self.kept_for {
            KeptFor::GoingOn => MOST_AHEAD,
            KeptFor::LaterPrompts => TAKEN_BACK,
        };
        self.window.map(|window| window.min(LONGEST) + taken_back)
    }
}

/// Most places that are held between two passes: those that may be asked for, the rest of a block in front of them, and
/// those of the next pass.
fn most_places(back: usize) -> usize {
    room(back + ATTENTION_BLOCK + OF_A_PASS)
}

/// Whether a text that is kept for later prompts, and that had `longest` tokens at most, still has what the tokens
/// behind the first `length` ones see, in layers with these windows. It does not depend on which of the layers are
/// here, so all processes that hold a model together decide alike.
pub(crate) fn goes_back(mut windows: impl Iterator<Item = Option<usize>>, longest: usize, length: usize) -> bool {
    length + TAKEN_BACK >= longest
        || windows.all(|window| Reach::new(window, KeptFor::LaterPrompts).first(0, longest) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (window, what the text is kept for, most places)
    const MOST: [(usize, KeptFor, usize); 8] = [
        (1, KeptFor::GoingOn, 96),
        (128, KeptFor::GoingOn, 256),
        (512, KeptFor::GoingOn, 768),
        (1024, KeptFor::GoingOn, 1536),
        (4096, KeptFor::GoingOn, 6144),
        (128, KeptFor::LaterPrompts, 1536),
        (512, KeptFor::LaterPrompts, 2048),
        (1024, KeptFor::LaterPrompts, 3072),
    ];

    /// Token by token: what may be asked for is there, the rest is bounded, and few steps forget anything.
    #[test]
    fn a_window_is_there_and_not_much_more() {
        for (window, kept_for, most) in MOST {
            let reach = Reach::new(Some(window), kept_for);
            let back = reach.back().expect("a window");
            let (mut start, mut times) = (0, 0);
            let tokens = 4 * most;
            for end in 1..=tokens {
                let first = reach.first(start, end);
                assert!(first >= start && first.is_multiple_of(ATTENTION_BLOCK), "{window}: {first} behind {start}");
                assert!(first == 0 || first + back <= end, "{window}: {first} is asked for at {end}");
                assert!(end - first + OF_A_PASS <= most, "{window}: {} places", end - first);
                assert_eq!(reach.places(end), room(end).min(most), "{window}: {end} tokens");
                times += usize::from(first > start);
                start = first;
            }
            assert!(start > 0 && times * OF_A_PASS <= tokens, "{window}: forgets {times} times");
        }
    }

    #[test]
    fn without_a_window_and_in_long_ones_nothing_is_forgotten() {
        for window in [None, Some(usize::MAX)] {
            let reach = Reach::new(window, KeptFor::GoingOn);
            assert_eq!((reach.first(0, 1 << 40), reach.places(1000)), (0, 1024));
            assert!(reach.places(usize::MAX) >= LONGEST);
        }
    }

    #[test]
    fn a_text_goes_back_as_far_as_its_narrowest_window_remembers() {
        for (windows, longest, length, want) in [
            (vec![None], 100_000, 0, true),
            (vec![None, Some(5)], 1528, 0, true),
            (vec![None, Some(5)], 1529, 0, false),
            (vec![None, Some(5)], 1529, 505, true),
            (vec![None, Some(5)], 1529, 504, false),
            (vec![Some(512), Some(4096)], 2040, 0, true),
            (vec![Some(4096), Some(512)], 2041, 64, false),
        ] {
            let got = goes_back(windows.iter().copied(), longest, length);
            assert_eq!(got, want, "{windows:?}: from {longest} to {length}");
        }
    }
}

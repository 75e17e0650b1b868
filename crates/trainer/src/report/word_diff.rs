//! What differs in an answer from the expected one, word by word.

use super::page::escape;

/// The most words of either side that are compared one by one. The table of the comparison has the
/// square of it.
const MOST_WORDS: usize = 600;

/// The answer as HTML. Words that the expected answer does not have at their place are marked;
/// missing ones cannot be.
pub(super) fn compared(answer: &str, expected: &str) -> String {
    let (answer, expected) = (words(answer.trim()), words(expected.trim()));
    let same = if answer.len().max(expected.len()) <= MOST_WORDS {
        common(&answer, &expected)
    } else {
        // Only the common beginning and end.
        let begin = answer.iter().zip(&expected).take_while(|(one, other)| one == other).count();
        let ends = answer[begin..].iter().rev().zip(expected[begin..].iter().rev());
        let end = answer.len() - ends.take_while(|(one, other)| one == other).count();
        (0..answer.len()).map(|word| word < begin || word >= end).collect()
    };
    let marked: Vec<(&str, bool)> = answer.into_iter().zip(same).collect();
    let stretches = marked.chunk_by(|one, next| one.1 == next.1);
    let html = stretches.map(|stretch| {
        let text = escape(&stretch.iter().map(|(word, _)| *word).collect::<String>());
        if stretch[0].1 { text } else { format!("<mark>{text}</mark>") }
    });
    html.collect()
}

/// The text as runs of letters and digits, and every other character by itself.
fn words(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let is_part = |letter: char| letter.is_alphanumeric() || letter == '_';
        let end = if is_part(first) {
            rest.find(|letter: char| !is_part(letter)).unwrap_or(rest.len())
        } else {
            first.len_utf8()
        };
        let (word, after) = rest.split_at(end);
        found.push(word);
        rest = after;
    }
    found
}

/// For each word of `answer`, whether it belongs to the longest common subsequence.
fn common(answer: &[&str], expected: &[&str]) -> Vec<bool> {
    // lengths[i][j]: of the rests answer[i..] and expected[j..].
    let mut lengths = vec![vec![0u16; expected.len() + 1]; answer.len() + 1];
    for i in (0..answer.len()).rev() {
        for j in (0..expected.len()).rev() {
            lengths[i][j] = match answer[i] == expected[j] {
                true => lengths[i + 1][j + 1] + 1,
                false => lengths[i + 1][j].max(lengths[i][j + 1]),
            };
        }
    }
    let (mut same, mut j) = (Vec::with_capacity(answer.len()), 0);
    for (i, word) in answer.iter().enumerate() {
        // Words of the expected answer that this one lacks are passed over.
        while j < expected.len() && *word != expected[j] && lengths[i][j + 1] >= lengths[i + 1][j] {
            j += 1;
        }
        let is_same = j < expected.len() && *word == expected[j];
        same.push(is_same);
        j += usize::from(is_same);
    }
    same
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_marked() {
        for (answer, expected, want) in [
            ("Open from 10 to 20.", "Open from 15 to 20.", "Open from <mark>10</mark> to 20."),
            ("same", "same\n", "same"),
            ("", "something", ""),
            ("Open", "Open from 15.", "Open"),
            ("naïve été", "naïve âté", "naïve <mark>été</mark>"),
            ("a b c", "b c d", "<mark>a </mark>b c"),
            ("{\"name\":\"Leo\"}", "{\"name\":\"Leon\"}", "{&quot;name&quot;:&quot;<mark>Leo</mark>&quot;}"),
            ("<b>", "x", "<mark>&lt;b&gt;</mark>"),
            ("</script>", "</script>", "&lt;/script&gt;"),
        ] {
            assert_eq!(compared(answer, expected), want, "{answer} against {expected}");
        }
    }

    #[test]
    fn long_answers_are_compared_from_both_ends() {
        let long = |word: &str| format!("{} {word} {}", "a ".repeat(700), "b ".repeat(700));
        let html = compared(&long("x"), &long("y"));
        assert_eq!(html.matches("<mark>").count(), 1);
        assert!(html.contains("<mark>x</mark>"));
    }

    #[test]
    fn words_are_the_text() {
        for text in ["", "a", " a  b", "ä_1-é", "漢字 x"] {
            assert_eq!(words(text).concat(), text);
        }
    }
}

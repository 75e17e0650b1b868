//! No text makes the crate panic, and every location of a problem lies in the text.

mod common;

use common::{CONTRACT, parse_with};
use finetune_recipe::keys::{KEYS, TABLES};
use finetune_recipe::{Location, RecipeError};

/// An endless stream of numbers from a seed, made by BLAKE3. A failure can be repeated.
struct Numbers(blake3::OutputReader);

impl Numbers {
    fn new(seed: u64) -> Numbers {
        Numbers(blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof())
    }

    fn below(&mut self, end: usize) -> usize {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        (u64::from_le_bytes(bytes) % end as u64) as usize
    }
}

fn check(seed: u64, text: &str, sets: &[&str]) {
    match parse_with(text, sets) {
        Ok(recipe) => {
            let again = parse_with(&recipe.to_toml(), &[]);
            let again = again.unwrap_or_else(|error| panic!("seed {seed}: {error}\n{text}"));
            assert_eq!(again, recipe, "seed {seed}\n{text}");
        }
        Err(RecipeError::Problems(problems)) => {
            assert!(!problems.problems.is_empty(), "seed {seed}");
            for problem in &problems.problems {
                assert!(!problem.message.contains('\n'), "seed {seed}: {}", problem.message);
                if let Location::Span(span) = &problem.location {
                    assert!(
                        span.start <= span.end && span.end <= text.len(),
                        "seed {seed}: {span:?} of {}",
                        text.len()
                    );
                    let (line, column) = problem.line_column(text).unwrap();
                    assert!(line >= 1 && column >= 1, "seed {seed}");
                }
            }
            let _ = problems.to_string();
        }
        Err(other) => panic!("seed {seed}: {other}"),
    }
}

/// The pieces that recipes are made of, in random order.
#[test]
fn random_pieces() {
    let values = [
        "0",
        "-1",
        "1",
        "1.5",
        "nan",
        "-inf",
        "1e400",
        "0x7fffffffffffffff",
        "99999999999999999999",
        "\"\"",
        "\"a\"",
        "\"5s\"",
        "\"99999999999999999999s\"",
        "\"5é\"",
        "'é'",
        "true",
        "[]",
        "[1]",
        "[0.1, 0.2]",
        "[\"a\"]",
        "[[]]",
        "{}",
        "{ a = 1 }",
        "{ a.b = 1 }",
        "1979-05-27",
        "\"~\"",
        "\"\\u0000\"",
        "\"\"\"\n\"\"\"",
        "\"all\"",
        "\"full\"",
        "\"..\"",
        "\"/\"",
        "\"é:1\"",
        "inf",
        "+0",
        "-0.0",
    ];
    for seed in 0..6_000 {
        let mut numbers = Numbers::new(seed);
        let mut text = String::new();
        for _ in 0..numbers.below(12) {
            let key = &KEYS[numbers.below(KEYS.len())];
            let name = match numbers.below(8) {
                0 => key.rivals[numbers.below(key.rivals.len())].0.to_owned(),
                1 => format!("\"é{}\\n\"", key.name()),
                _ => key.path.to_owned(),
            };
            text += &match numbers.below(12) {
                0 => format!("[{}]\n", TABLES[numbers.below(TABLES.len())]),
                1 => format!("[[{}]]\n", TABLES[numbers.below(TABLES.len())]),
                _ => format!("{name} = {}\n", values[numbers.below(values.len())]),
            };
        }
        let set = format!("{}={}", KEYS[numbers.below(KEYS.len())].path, values[numbers.below(values.len())]);
        check(seed, &text, &[&set, "model.path=gpt2", "data.train=a"][numbers.below(4).min(2)..]);
    }
}

/// The full example with characters removed, doubled or replaced.
#[test]
fn random_damage() {
    let letters: Vec<char> = "\"'[]{}=.,#\n\r\t \\é\u{0}\u{feff}0-e_x🦀".chars().collect();
    for seed in 0..2_000 {
        let mut numbers = Numbers::new(seed);
        let mut text: Vec<char> = CONTRACT.chars().collect();
        for _ in 0..1 + numbers.below(6) {
            let place = numbers.below(text.len());
            match numbers.below(3) {
                0 => drop(text.remove(place)),
                1 => text.insert(place, letters[numbers.below(letters.len())]),
                _ => text[place] = letters[numbers.below(letters.len())],
            }
        }
        check(seed, &text.into_iter().collect::<String>(), &[]);
    }
}

#[test]
fn random_letters() {
    for seed in 0..6_000 {
        let mut numbers = Numbers::new(seed);
        let length = numbers.below(60);
        let letter = |numbers: &mut Numbers| match numbers.below(3) {
            0 => char::from_u32(numbers.below(0x11_0000) as u32).unwrap_or('?'),
            1 => char::from(numbers.below(128) as u8),
            _ => ['"', '=', '[', ']', '\n', '.', '{', '}', 'a', '1', '\''][numbers.below(11)],
        };
        let text: String = (0..length).map(|_| letter(&mut numbers)).collect();
        check(seed, &text, &[]);
        check(seed, CONTRACT, &[&text]);
    }
}

#[test]
fn large_and_deep() {
    check(0, &"[".repeat(100_000), &[]);
    check(1, &format!("x = {}", "[".repeat(100_000)), &[]);
    check(2, &format!("a{} = 1", ".a".repeat(100_000)), &[]);
    check(3, &(0..40_000).map(|key| format!("key{key} = 1\n")).collect::<String>(), &[]);
    check(4, &format!("{} = 1", "k".repeat(1_000_000)), &[]);
    check(5, &format!("[lora]\nrank = {}", "9".repeat(1_000_000)), &[]);
    check(6, CONTRACT, &[&format!("lora.rank={}", "[".repeat(100_000))]);
}

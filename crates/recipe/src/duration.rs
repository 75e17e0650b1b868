//! Durations as the recipe writes them: a whole number and a unit.

use std::time::Duration;

/// The longest duration that a recipe may name.
pub(crate) const LONGEST: Duration = Duration::from_secs(3600);

/// "500ms", "5s", "2m" or "1h"; `None` for any other text.
pub(crate) fn parse(text: &str) -> Option<Duration> {
    let digits = text.find(|letter: char| !letter.is_ascii_digit())?;
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    let milliseconds = match unit.trim() {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return None,
    };
    number.checked_mul(milliseconds).map(Duration::from_millis)
}

/// The text that [`parse`] reads back to the same duration.
pub(crate) fn text(duration: Duration) -> String {
    let milliseconds = duration.as_millis();
    if milliseconds.is_multiple_of(1000) { format!("{}s", milliseconds / 1000) } else { format!("{milliseconds}ms") }
}

//! Dates as the recipe writes them: year, month, day.

/// Whether a text is a day that exists, in the form "2026-11-27".
pub(crate) fn is_date(text: &str) -> bool {
    let digits = |range: std::ops::Range<usize>| -> Option<u32> {
        text.get(range).filter(|part| part.bytes().all(|byte| byte.is_ascii_digit()))?.parse().ok()
    };
    let separated = text.len() == 10 && text.as_bytes()[4] == b'-' && text.as_bytes()[7] == b'-';
    let (Some(year), Some(month), Some(day)) = (digits(0..4), digits(5..7), digits(8..10)) else { return false };
    let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let days = match month {
        4 | 6 | 9 | 11 => 30,
        2 if leap => 29,
        2 => 28,
        1..=12 => 31,
        _ => 0,
    };
    separated && year > 0 && (1..=days).contains(&day)
}

#[cfg(test)]
mod tests {
    use super::is_date;

    #[test]
    fn days_that_there_are() {
        for (text, there) in [
            ("2026-11-27", true),
            ("2024-02-29", true),
            ("2025-02-29", false),
            ("1900-02-29", false),
            ("2026-13-01", false),
            ("2026-11-31", false),
            ("2026-00-10", false),
            ("26-11-27", false),
            ("2026/11/27", false),
            ("2026-11-2é", false),
            ("+026-11-27", false),
            ("", false),
        ] {
            assert_eq!(is_date(text), there, "{text}");
        }
    }
}

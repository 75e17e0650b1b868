//! How numbers are written for people, in the terminal and in the report.

/// A number with a comma at each thousand: "4,884,480".
pub fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (n, digit) in digits.chars().enumerate() {
        if n > 0 && (digits.len() - n).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

pub use finetune_store::human_bytes as bytes;

/// A number with its noun: "1 row", "12,000 rows". `one` is the singular, whose plural ends in an
/// s.
pub fn counted(number: u64, one: &str) -> String {
    let more = match number {
        1 => "",
        _ if one.ends_with("ch") => "es",
        _ => "s",
    };
    format!("{} {one}{more}", thousands(number))
}

/// Whole seconds: "9s", "2m45s", "3h07m".
pub fn duration(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s}s"),
        (0, m, s) => format!("{m}m{s:02}s"),
        (h, m, _) => format!("{h}h{m:02}m"),
    }
}

/// Seconds of something that may take milliseconds: "0.37 s", "12 s".
pub fn seconds(seconds: f64) -> String {
    match seconds {
        long if long >= 60.0 => duration(long),
        middle if middle >= 10.0 => format!("{middle:.0} s"),
        short if short >= 0.1 => format!("{short:.2} s"),
        tiny => format!("{tiny:.4} s"),
    }
}

/// A learning rate: "2.0e-4", "0".
pub fn rate(rate: f64) -> String {
    if rate == 0.0 { "0".to_owned() } else { format!("{rate:.1e}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_people_read_them() {
        let cases = [
            (thousands(0), "0"),
            (thousands(999), "999"),
            (thousands(4_884_480), "4,884,480"),
            (counted(1, "step"), "1 step"),
            (counted(0, "step"), "0 steps"),
            (counted(12_000, "row"), "12,000 rows"),
            (counted(2, "micro-batch"), "2 micro-batches"),
            (bytes(1), "1 byte"),
            (bytes(58_791_147), "56.1 MiB"),
            (bytes(49_756 << 20), "48.6 GiB"),
            (duration(0.4), "0s"),
            (duration(165.0), "2m45s"),
            (duration(11_220.0), "3h07m"),
            (seconds(0.0661), "0.0661 s"),
            (seconds(0.3688), "0.37 s"),
            (seconds(12.3), "12 s"),
            (seconds(61.0), "1m01s"),
            (rate(0.0), "0"),
            (rate(2e-4), "2.0e-4"),
            (rate(1.6e-4), "1.6e-4"),
            (rate(1e-2), "1.0e-2"),
        ];
        for (got, want) in cases {
            assert_eq!(got, want);
        }
    }
}

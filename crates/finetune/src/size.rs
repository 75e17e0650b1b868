//! Sizes in arguments: a number with a unit, such as `64G`, `2.8GB/s` or `10Gbit/s`.

use crate::failure::Failure;

/// Units of memory and buffers.
pub(crate) const BINARY: f64 = 1024.0;
/// Units of disks and networks.
pub(crate) const DECIMAL: f64 = 1000.0;

/// From here on numbers are no sizes.
const TOO_LARGE: f64 = 9e18;

/// A number of 1 or more with a unit: K, M, G or T are powers of `thousand`, capital or not. `B`, `iB`, `bit` and `/s`
/// behind it change nothing.
///
/// # Errors
/// If the value of `option` is no such size.
pub(crate) fn size(option: &str, text: &str, thousand: f64) -> Result<f64, Failure> {
    let wrong = || Failure::arguments(format!("{option} {text}: not a size"), "such as 1K, 64M, 2.8G or 1T");
    let lower = text.trim().to_ascii_lowercase();
    let plain =
        ["/s", "bit", "ib", "b"].iter().fold(lower.as_str(), |text, end| text.strip_suffix(end).unwrap_or(text));
    let units = [("k", 1), ("m", 2), ("g", 3), ("t", 4)];
    let unit = units.iter().find_map(|(unit, power)| Some((plain.strip_suffix(unit)?, *power)));
    let (digits, power) = unit.unwrap_or((plain, 0));
    let value: f64 = digits.trim().parse().map_err(|_| wrong())?;
    let value = value * thousand.powi(power);
    if (1.0..TOO_LARGE).contains(&value) { Ok(value) } else { Err(wrong()) }
}

/// The same of sizes of machines. A small number without a unit is one that its unit is missing of.
///
/// # Errors
/// If it is no such size, or has no unit and is less than a million.
pub(crate) fn machine_size(option: &str, text: &str, thousand: f64) -> Result<f64, Failure> {
    const LEAST: f64 = 1e6;
    let value = size(option, text, thousand)?;
    let text = text.trim();
    if value >= LEAST || !text.ends_with(|end: char| end.is_ascii_digit() || end == '.') {
        return Ok(value);
    }
    Err(Failure::arguments(format!("{option} {text}: the unit is missing"), format!("write {text}G, or {text}M")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_have_no_few_bytes() {
        for (text, want) in [
            ("64G", Some(64e9)),
            ("1K", Some(1e3)),
            ("500 B", Some(500.0)),
            ("16000000000", Some(16e9)),
            ("64", None),
            ("2.5", None),
            ("999999", None),
            ("G", None),
        ] {
            assert_eq!(machine_size("--disk", text, DECIMAL).ok(), want, "{text}");
        }
    }

    #[test]
    fn sizes_have_units() {
        for (text, thousand, want) in [
            ("64G", BINARY, 64.0 * 1024.0 * 1024.0 * 1024.0),
            ("512M", BINARY, 536_870_912.0),
            ("64MiB", BINARY, 67_108_864.0),
            ("2gb", BINARY, 2_147_483_648.0),
            ("1.5K", BINARY, 1536.0),
            ("1", BINARY, 1.0),
            ("2.8G", DECIMAL, 2.8e9),
            ("2.8GB/s", DECIMAL, 2.8e9),
            ("10Gbit/s", DECIMAL, 1e10),
            ("100", DECIMAL, 100.0),
        ] {
            assert_eq!(size("--disk", text, thousand).ok(), Some(want), "{text}");
        }
        for text in ["", "G", "-1G", "0", "nan", "inf", "1X", "64 houses", "9999999999T", "1e300"] {
            assert!(size("--memory", text, BINARY).is_err(), "{text}");
        }
    }
}

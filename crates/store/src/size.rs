//! Numbers of bytes, for people to read.

/// "1.1 GiB", "56.0 MiB", "300 bytes": powers of 1024, one decimal.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [(&str, f64); 4] =
        [("TiB", 1099511627776.0), ("GiB", 1073741824.0), ("MiB", 1048576.0), ("KiB", 1024.0)];
    let found = UNITS.iter().find(|(_, size)| bytes as f64 >= *size);
    let few = if bytes == 1 { "1 byte".to_owned() } else { format!("{bytes} bytes") };
    found.map_or(few, |(unit, size)| format!("{:.1} {unit}", bytes as f64 / size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_that_fit() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (1, "1 byte"),
            (1023, "1023 bytes"),
            (1024, "1.0 KiB"),
            (58_791_147, "56.1 MiB"),
            (49_756 << 20, "48.6 GiB"),
            (3 << 40, "3.0 TiB"),
        ] {
            assert_eq!(human_bytes(bytes), text);
        }
    }
}

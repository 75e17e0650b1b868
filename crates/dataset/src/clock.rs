//! This machine's clock. chrono's own reading of it panics if the clock, or the time of a file,
//! lies outside of its years.

use std::time::{SystemTime, UNIX_EPOCH};

use chrono::{DateTime, Local, NaiveDateTime};

/// The local time now.
pub fn now() -> NaiveDateTime {
    local(SystemTime::now())
}

/// A moment as local time. Before 1970 and from the year 10000 on a clock is wrong, and as good as
/// one that has never been set.
pub fn local(time: SystemTime) -> NaiveDateTime {
    const YEAR_10000: u64 = 253_402_300_800;
    let since = time.duration_since(UNIX_EPOCH).ok().filter(|since| since.as_secs() < YEAR_10000).unwrap_or_default();
    let utc = DateTime::from_timestamp(since.as_secs() as i64, since.subsec_nanos()).unwrap_or_default();
    utc.with_timezone(&Local).naive_local()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_wrong_clock_is_one_that_was_never_set() {
        let unset = local(UNIX_EPOCH);
        assert_eq!(local(UNIX_EPOCH - Duration::from_secs(86_400)), unset);
        assert_eq!(local(UNIX_EPOCH + Duration::from_secs(8_000_000_000_000)), unset);
        // A time zone may have another offset then.
        let hours = (local(UNIX_EPOCH + Duration::from_secs(480_000 * 3600)) - unset).num_hours();
        assert!((hours - 480_000).abs() <= 24, "{hours}");
    }
}

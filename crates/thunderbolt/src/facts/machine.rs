//! The machine itself: release, memory, disk, clock, limits, power settings, firewall, listening
//! ports.

use std::net::{IpAddr, Ipv6Addr};

use super::{MAX_ENTRIES, name};

/// Ports in use that are kept: a machine has at most 65,536.
const MAX_LISTENING: usize = 1 << 16;

/// A host's clock.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Clock {
    /// Seconds that it is ahead of this machine's; negative: behind.
    pub ahead: f64,
    /// Seconds by which that may be wrong: one where `date` counts whole seconds, and the way of
    /// the answer.
    pub error: f64,
}

/// A program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Build {
    /// What `--version` prints.
    pub version: String,
    /// CRC and size, of POSIX's `cksum`.
    pub checksum: Option<(u32, u64)>,
}

/// A Mac's power settings; see `pmset -g`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Power {
    /// Minutes until it sleeps if it is not used; 0 for never.
    pub sleep_minutes: u32,
    /// Whether it starts again after a power failure.
    pub restarts: Option<bool>,
}

/// Whether a host has a firewall.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Firewall {
    /// None is on.
    Off,
    /// On, with the name of the firewall.
    On(String),
    /// On, and it lets nothing in.
    BlocksAll,
}

/// `date +%s.%N`, where %N may be unknown and printed as it is.
pub(super) fn clock(text: &str, arrived: f64) -> Option<Clock> {
    let (seconds, fraction) = text.trim().split_once('.')?;
    let seconds: u64 = seconds.parse().ok()?;
    // The answer travels for less than the time of a connection over a slow network.
    const WAY: f64 = 0.2;
    // Whole seconds: the middle of the second is the best guess.
    let (fraction, error) = match fraction.len() == 9 {
        true => fraction.parse::<u32>().map_or((0.5, 0.5), |nanoseconds| (f64::from(nanoseconds) / 1e9, 0.0)),
        false => (0.5, 0.5),
    };
    Some(Clock { ahead: seconds as f64 + fraction - arrived, error: error + WAY })
}

/// `$SSH_CONNECTION`: the client's address and port, ours and ours.
pub(super) fn way_in(text: &str) -> Option<IpAddr> {
    let address = text.split_whitespace().nth(2)?;
    let address: IpAddr = address.split('%').next()?.parse().ok()?;
    Some(match address {
        IpAddr::V6(six) => Ipv6Addr::to_ipv4_mapped(&six).map_or(address, IpAddr::V4),
        four => four,
    })
}

/// The first line, such as "finetune 0.1.0".
pub(super) fn version(text: &str) -> Option<String> {
    name(text.lines().next()?.trim())
}

/// "4038471504 10485760 /usr/local/bin/finetune".
pub(super) fn checksum(text: &str) -> Option<(u32, u64)> {
    let mut words = text.split_whitespace();
    Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
}

/// `df -Pk`: the fourth column of the second line, in KiB.
pub(super) fn disk_free(text: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.contains('%') && !line.contains("Available"))?;
    // A name of a file system may have spaces: count from the percentage.
    let words: Vec<&str> = line.split_whitespace().collect();
    let percentage = words.iter().position(|word| word.ends_with('%'))?;
    words.get(percentage.checked_sub(1)?)?.parse::<u64>().ok()?.checked_mul(1024)
}

/// `ulimit`: a number of units, or "unlimited".
pub(super) fn limit(text: &str, unit: u64) -> Option<u64> {
    match text.trim() {
        "unlimited" => Some(u64::MAX),
        number => number.parse::<u64>().ok()?.checked_mul(unit),
    }
}

/// `sw_vers`: ProductVersion and BuildVersion.
pub(super) fn mac_release(text: &str) -> Option<(String, String)> {
    let value = |key: &str| text.lines().find_map(|line| name(line.strip_prefix(key)?.strip_prefix(':')?.trim()));
    Some((value("ProductVersion")?, value("BuildVersion")?))
}

/// Model, chip and memory of `sysctl hw.model hw.memsize machdep.cpu.brand_string`.
pub(super) fn mac_hardware(text: &str) -> Option<(Option<String>, Option<String>, Option<u64>)> {
    let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(": ")).map(str::trim);
    let memory = value("hw.memsize").and_then(|bytes| bytes.parse().ok());
    Some((value("hw.model").and_then(name), value("machdep.cpu.brand_string").and_then(name), memory))
}

/// `pmset -g`: lines " sleep                1 (sleep prevented by powerd)"; "Sleep On Power Button
/// 1" is another one.
pub(super) fn power(text: &str) -> Option<Power> {
    let value = |key: &str| {
        let line = text.lines().find(|line| line.split_whitespace().next() == Some(key))?;
        line.split_whitespace().nth(1)?.parse::<u32>().ok()
    };
    let disabled = value("SleepDisabled") == Some(1);
    let sleep_minutes = if disabled { 0 } else { value("sleep")? };
    Some(Power { sleep_minutes, restarts: value("autorestart").map(|value| value != 0) })
}

/// `socketfilterfw --getglobalstate`: "Firewall is enabled. (State = 1)", State 2 when it blocks
/// all.
pub(super) fn mac_firewall(text: &str) -> Option<Firewall> {
    let state = text.split_once("State = ")?.1.chars().next()?;
    match state {
        '0' => Some(Firewall::Off),
        '1' => Some(Firewall::On("macOS's application firewall".into())),
        '2' => Some(Firewall::BlocksAll),
        _ => None,
    }
}

/// Lines "ufw active".
pub(super) fn linux_firewall(text: &str) -> Option<Firewall> {
    let active = |line: &str| {
        line.split_once(' ').filter(|(_, state)| state.trim() == "active").map(|(name, _)| name.to_owned())
    };
    let names: Vec<String> = text.lines().take(MAX_ENTRIES).filter_map(active).collect();
    match (names.is_empty(), text.contains("active")) {
        (false, _) => Some(Firewall::On(names.join(" and "))),
        (true, true) => Some(Firewall::Off),
        // No systemd: nothing is known.
        (true, false) => None,
    }
}

/// PRETTY_NAME="Debian GNU/Linux 13 (trixie)".
pub(super) fn linux_release(text: &str) -> Option<String> {
    name(text.lines().next()?.strip_prefix("PRETTY_NAME=")?.trim().trim_matches('"'))
}

/// "MemTotal:       32780932 kB".
pub(super) fn linux_memory(text: &str) -> Option<u64> {
    text.split_whitespace().nth(1)?.parse::<u64>().ok()?.checked_mul(1024)
}

/// Local addresses in the lines of `netstat -an -p tcp` and `ss -ltn`: the fourth column, "*.22",
/// "127.0.0.1.631", "[::]:22" or "0.0.0.0:22".
pub(super) fn listening(text: &str) -> Option<Vec<u16>> {
    let port = |line: &str| line.split_whitespace().nth(3)?.rsplit(['.', ':']).next()?.parse::<u16>().ok();
    let mut ports: Vec<u16> = text.lines().filter_map(port).take(MAX_LISTENING).collect();
    ports.sort_unstable();
    ports.dedup();
    Some(ports)
}

//! Where rank 0 listens: hosts, ports, and ports made from the name of a job.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use super::error::{EnvironmentError, shown};
use super::variables::{Setting, Variables};
use crate::this_host::is_loopback;

/// Host and port. As a rendezvous: where rank 0 listens and the other ranks call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPort {
    /// A name or an address; IPv6 without brackets.
    pub host: String,
    /// 1 to 65535.
    pub port: u16,
}

impl fmt::Display for HostPort {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(formatter, "[{}]:{}", self.host, self.port)
        } else {
            write!(formatter, "{}:{}", self.host, self.port)
        }
    }
}

impl HostPort {
    /// True if it can be reached from rank 0's own host only, so that every rank must be there.
    pub fn is_loopback(&self) -> bool {
        is_loopback(&self.host) && !self.is_unspecified()
    }

    /// True of 0.0.0.0 and ::, where a rank can listen and none can be called.
    pub fn is_unspecified(&self) -> bool {
        self.host.parse().is_ok_and(|address: IpAddr| address.is_unspecified())
    }

    /// From one variable with host and port in it.
    pub(super) fn of_pair(setting: &Setting) -> Result<Self, EnvironmentError> {
        let Setting { name, value } = setting;
        pair(value).map_err(|what| EnvironmentError::Address { name, value: shown(value), what })
    }
}

/// The port that torchrun and its successors fall back to.
pub(super) const DEFAULT_PORT: u16 = 29500;

/// `MASTER_ADDR` or `PET_MASTER_ADDR`, checked.
pub(super) fn host(variables: &Variables<'_>, names: &[&'static str]) -> Result<Option<String>, EnvironmentError> {
    let Some(Setting { name, value }) = variables.first(names) else {
        return Ok(None);
    };
    let what = match host_of(&value) {
        Ok(host) => return Ok(Some(host)),
        Err(what) => what,
    };
    Err(EnvironmentError::Address { name, value: shown(&value), what })
}

/// `MASTER_PORT` or `PET_MASTER_PORT`, checked.
pub(super) fn port(variables: &Variables<'_>, names: &[&'static str]) -> Result<Option<u16>, EnvironmentError> {
    let Some(Setting { name, value }) = variables.first(names) else {
        return Ok(None);
    };
    port_of(&value).map(Some).map_err(|what| EnvironmentError::Port { name, value: shown(&value), what })
}

/// "10.0.0.1:5000", "gpu01:5000" or "[fd00::1]:5000".
pub(super) fn pair(text: &str) -> Result<HostPort, &'static str> {
    let (host, port) = text.rsplit_once(':').ok_or("there is no port after it")?;
    if host.contains(':') && !host.starts_with('[') {
        return Err("an IPv6 address with a port is written in brackets, such as [fd00::1]:32323");
    }
    Ok(HostPort { host: host_of(host)?, port: port_of(port)? })
}

fn host_of(text: &str) -> Result<String, &'static str> {
    const LONGEST: usize = 253; // of a DNS name in dotted form
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let is_version_6 = |text: &str| text.split('%').next().is_some_and(|address| address.parse::<Ipv6Addr>().is_ok());
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_:%".contains(&byte);
    if bare.is_empty() {
        return Err("the host is empty");
    }
    if bare.len() > LONGEST {
        return Err("the host is longer than 253 bytes");
    }
    if text.contains("://") {
        return Err("it is a URL; write the host alone");
    }
    if !bare.bytes().all(is_plain) {
        return Err("the host has a character that no name and no address has");
    }
    if bare.starts_with('-') {
        return Err("the host starts with '-'");
    }
    if !is_version_6(bare) && bare.contains(':') {
        return Err("it has a colon and is no IPv6 address; a port has a variable of its own");
    }
    if bare.len() < text.len() && !is_version_6(bare) {
        return Err("only an IPv6 address is written in brackets");
    }
    Ok(bare.to_owned())
}

fn port_of(text: &str) -> Result<u16, &'static str> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("the port is not a number");
    }
    match text.parse() {
        Ok(0) => Err("port 0 means any port, and the other ranks could not know which"),
        Ok(port) => Ok(port),
        Err(_) => Err("the highest port is 65535"),
    }
}

/// A port made from the name of a job: the same in all its ranks, and another for another job.
///
/// The name is read as a decimal number modulo a prime. So names that differ in one number (job
/// ids, steps of a job, process ids) give different ports if these numbers are less than the prime
/// apart. The ports lie above those of services. They lie below those of outgoing connections,
/// which begin at 32768 on Linux and 49152 on macOS.
pub(super) fn port_of_job(job: &str) -> u16 {
    const FIRST: u64 = 15_000;
    const PRIME: u64 = 16_381;
    let number = job.bytes().fold(0, |number, byte| (number * 10 + u64::from(byte)) % PRIME);
    // 31380 at most.
    u16::try_from(FIRST + number).unwrap_or(DEFAULT_PORT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs() {
        let cases = [
            ("10.0.0.1:5000", Ok(("10.0.0.1", 5000, "10.0.0.1:5000"))),
            ("gpu-01.cluster_a:65535", Ok(("gpu-01.cluster_a", 65535, "gpu-01.cluster_a:65535"))),
            ("[fd00::1]:1", Ok(("fd00::1", 1, "[fd00::1]:1"))),
            ("[fe80::1%en5]:7", Ok(("fe80::1%en5", 7, "[fe80::1%en5]:7"))),
            ("10.0.0.1", Err("there is no port after it")),
            ("10.0.0.1:", Err("the port is not a number")),
            ("10.0.0.1:+5", Err("the port is not a number")),
            ("10.0.0.1:0", Err("port 0 means any port, and the other ranks could not know which")),
            ("10.0.0.1:65536", Err("the highest port is 65535")),
            (":5000", Err("the host is empty")),
            ("fd00::1:5000", Err("an IPv6 address with a port is written in brackets, such as [fd00::1]:32323")),
            ("[gpu01]:5000", Err("only an IPv6 address is written in brackets")),
            ("[gpu01:5000", Err("the host has a character that no name and no address has")),
            ("a b:5000", Err("the host has a character that no name and no address has")),
            ("-oProxyCommand:5000", Err("the host starts with '-'")),
        ];
        for (text, expected) in cases {
            let seen = pair(text).map(|pair| (pair.host.clone(), pair.port, pair.to_string()));
            assert_eq!(seen, expected.map(|(host, port, shown)| (host.into(), port, shown.into())), "{text}");
        }
    }

    #[test]
    fn loopback() {
        for (host, expected) in [
            ("127.0.0.1", true),
            ("127.8.8.8", true),
            ("::1", true),
            ("localhost", true),
            ("LocalHost", true),
            ("10.0.0.1", false),
            ("localhost.example", false),
        ] {
            assert_eq!(HostPort { host: host.into(), port: 1 }.is_loopback(), expected, "{host}");
        }
    }

    #[test]
    fn jobs_get_ports_of_their_own() {
        let jobs = (4_123_000..4_124_000).map(|job| format!("{job}.0"));
        let steps = (1..10).map(|step| format!("4123000.{step}"));
        let ports: Vec<u16> = jobs.chain(steps).map(|job| port_of_job(&job)).collect();
        assert!(ports.iter().all(|port| (15_000..32_768).contains(port)));
        let mut different = ports.clone();
        different.sort_unstable();
        different.dedup();
        assert_eq!(different.len(), ports.len());
        for text in ["", "prterun-host-4711@1", &"9".repeat(100_000)] {
            assert!((15_000..32_768).contains(&port_of_job(text)));
        }
    }
}

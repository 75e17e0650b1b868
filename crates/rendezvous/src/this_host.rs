//! Whether a name or an address means this very host. All callers ask here, so that all follow one
//! rule.

use std::net::IpAddr;

/// Whether a host's name, as ssh takes it, means the host that this program runs on: a loopback
/// name or address, or a name that this host calls itself. A name with a user (`user@host`) does
/// not: that user may be another one.
pub fn is_this_host(name: &str) -> bool {
    is_loopback(name) || is_own_name(name, &own_name())
}

/// What this host calls itself: `uname -n`.
pub fn own_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Whether `name` is `own`, the first part of `own`, or that part below ".local" as a Mac is
/// called.
fn is_own_name(name: &str, own: &str) -> bool {
    let plain = |name: &str| name.trim_end_matches('.').to_ascii_lowercase();
    let (name, own) = (plain(name), plain(own));
    let short = own.split('.').next().unwrap_or_default();
    // A host without a name may call itself "" or "(none)". An address is no name with a first
    // part.
    let is_name = !short.is_empty() && short.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
    is_name && own.parse::<IpAddr>().is_err() && (name == own || name == short || name == format!("{short}.local"))
}

/// What ssh takes, without the user; of `ssh://user@host:port` the host alone.
pub fn machine_name(ssh: &str) -> &str {
    let after_user = |text: &str| text.rfind('@').map_or(0, |at| at + 1);
    let Some(uri) = ssh.strip_prefix("ssh://") else { return &ssh[after_user(ssh)..] };
    let place = uri.split('/').next().unwrap_or(uri);
    let place = &place[after_user(place)..];
    match place.strip_prefix('[').and_then(|inside| inside.split_once(']')) {
        Some((address, _)) => address,
        None => place.split(':').next().unwrap_or(place),
    }
}

/// Whether a name or an address, as it is written, leads to the host that uses it.
pub fn is_loopback(address: &str) -> bool {
    let plain = address.split('%').next().unwrap_or(address).trim_matches(['[', ']']);
    match plain.parse::<IpAddr>() {
        Ok(address) => address.to_canonical().is_loopback() || address.is_unspecified(),
        Err(_) => {
            let name = plain.trim_end_matches('.').to_ascii_lowercase();
            matches!(
                name.as_str(),
                "localhost" | "localhost.localdomain" | "localhost6" | "ip6-localhost" | "ip6-loopback"
            ) || name.ends_with(".localhost")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_this_host() {
        for (name, expected) in [
            ("localhost", true),
            ("LocalHost", true),
            ("127.0.0.1", true),
            ("127.8.8.8", true),
            ("::1", true),
            ("[::1]", true),
            ("::ffff:127.0.0.1", true),
            ("user@localhost", false),
            ("10.0.0.1", false),
            ("fd00::1", false),
            ("localhost.example", false),
            ("no-such-host.invalid", false),
            ("", false),
        ] {
            assert_eq!(is_this_host(name), expected, "{name:?}");
        }
    }

    #[test]
    fn machines_of_what_ssh_takes() {
        for (ssh, machine) in [
            ("mini-1", "mini-1"),
            ("me@mini-1", "mini-1"),
            ("me@work@mini-1", "mini-1"),
            ("fd00::1", "fd00::1"),
            ("ssh://mini-1", "mini-1"),
            ("ssh://me@mini-1:2222", "mini-1"),
            ("ssh://me@[fd00::1]:22/", "fd00::1"),
        ] {
            assert_eq!(machine_name(ssh), machine, "{ssh}");
        }
    }

    #[test]
    fn own_names() {
        for (name, own, expected) in [
            ("mini-1", "mini-1", true),
            ("MINI-1", "Mini-1.local", true),
            ("mini-1.local", "mini-1", true),
            ("mini-1.local.", "Mini-1.local", true),
            ("gpu01", "gpu01.cluster.example", true),
            ("gpu01.cluster.example", "gpu01.cluster.example", true),
            ("gpu01.other.example", "gpu01.cluster.example", false),
            ("mini-2", "mini-1", false),
            ("user@mini-1", "mini-1", false),
            ("", "", false),
            ("(none)", "(none)", false),
            ("10", "10.0.0.1", false),
        ] {
            assert_eq!(is_own_name(name, own), expected, "{name:?} at {own:?}");
        }
    }
}

//! Addresses of "ips" that no rank can be called at. They are refused before anything is started:
//! a rank would call one of them until its time is over.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// What is wrong with an address, as the end of a sentence that begins with it. `None`: nothing. A
/// name is an address too.
pub(super) fn fault_of(address: &str) -> Option<String> {
    if let Some(inside) = in_brackets(address) {
        return Some(format!(": write it without brackets, {inside:?}"));
    }
    if has_port(address) {
        return Some(" has a port".to_owned());
    }
    if address.contains('/') {
        return Some(" is no address of a host: write it without what stands from the '/' on".to_owned());
    }
    let is_of_numbers = address.contains('.') && address.bytes().all(|byte| byte == b'.' || byte.is_ascii_digit());
    if is_of_numbers && address.parse::<Ipv4Addr>().is_err() {
        return Some(" is no IPv4 address: that is four numbers from 0 to 255, without zeros in front".to_owned());
    }
    let (alone, interface) = address.split_once('%').map_or((address, None), |(alone, zone)| (alone, Some(zone)));
    match alone.parse::<IpAddr>().ok()? {
        ip if ip.is_multicast() || ip == IpAddr::V4(Ipv4Addr::BROADCAST) => {
            Some(" means many hosts, not one".to_owned())
        }
        IpAddr::V6(ip) if ip.is_unicast_link_local() && interface.is_none_or(str::is_empty) => {
            Some(format!(" means another host on each interface: name the interface, as in \"{ip}%en5\""))
        }
        _ => None,
    }
}

/// True for "10.0.0.1:5000", which is two things in one, and not for the IPv6 address "fd00::1" or
/// "fe80::1%en5".
pub(super) fn has_port(address: &str) -> bool {
    address.contains(':') && address.split('%').next().is_none_or(|address| address.parse::<Ipv6Addr>().is_err())
}

/// The address in "[fd00::1]".
fn in_brackets(address: &str) -> Option<&str> {
    let inside = address.strip_prefix('[')?.strip_suffix(']')?;
    inside.split('%').next()?.parse::<Ipv6Addr>().ok().map(|_| inside)
}

#[cfg(test)]
mod tests {
    use super::fault_of;

    #[test]
    fn addresses_that_cannot_be_called_are_told_from_those_that_can() {
        for fine in ["10.0.0.1", "mini-1.local", "fd77::1", "fe80::1%en5", "::1", "0.0.0.0", "x", "10", "mini.1"] {
            assert_eq!(fault_of(fine), None, "{fine}");
        }
        for (address, why) in [
            ("[fd77::1]", "without brackets, \"fd77::1\""),
            ("10.0.0.1:22", "has a port"),
            ("10.0.0.1/24", "without what stands from the '/' on"),
            ("010.0.0.1", "no IPv4 address"),
            ("10.0.1", "no IPv4 address"),
            ("10.0.0.256", "no IPv4 address"),
            ("224.0.0.1", "many hosts"),
            ("255.255.255.255", "many hosts"),
            ("ff02::1%en5", "many hosts"),
            ("fe80::1", "name the interface, as in \"fe80::1%en5\""),
            ("fe80::1%", "name the interface"),
        ] {
            let told = fault_of(address).unwrap_or_else(|| panic!("{address} was taken"));
            assert!(told.contains(why), "{address}: {told}");
        }
    }
}

//! The addresses of this machine.

use std::net::{IpAddr, SocketAddr, TcpListener};

/// The addresses of its network interfaces that are up, without loopback and those that hold on one
/// cable alone.
pub(crate) fn own() -> Vec<IpAddr> {
    let interfaces = if_addrs::get_if_addrs().unwrap_or_default();
    interfaces.iter().filter(|one| !one.is_loopback() && !one.is_link_local()).map(if_addrs::Interface::ip).collect()
}

/// Whether a socket of this machine can have this address.
pub(crate) fn is_own(mut address: SocketAddr) -> bool {
    address.set_port(0);
    TcpListener::bind(address).is_ok()
}

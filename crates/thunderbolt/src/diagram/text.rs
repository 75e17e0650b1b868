//! The picture for a terminal: each host with its ports and what is at the other end of each, then
//! who reaches whom.

use std::fmt::Write;

use crate::discover::Discovery;
use crate::facts::{Facts, Medium, Port, System, VerbsDevice};

/// Above this number a table of all pairs does not fit a terminal.
const MAX_COLUMNS: usize = 10;

/// Plain text of any number of lines, without colours.
pub fn text(discovery: &Discovery) -> String {
    let mut picture = String::new();
    for (host, facts) in discovery.hosts.iter().enumerate() {
        let _ = writeln!(picture, "{}", heading(facts));
        match &facts.ports {
            Some(ports) => picture.push_str(&sockets(discovery, host, ports)),
            None if facts.system == System::Mac => {
                let _ = writeln!(picture, "  Thunderbolt: unknown, {}", facts.why("thunderbolt"));
            }
            None => picture.push_str(&interfaces(facts)),
        }
    }
    for error in &discovery.unreachable {
        let _ = writeln!(picture, "{error}");
    }
    if discovery.is_cabled() && discovery.hosts.len() <= MAX_COLUMNS {
        picture.push('\n');
        picture.push_str(&table(discovery));
    }
    picture
}

/// "mini-1: Mac16,11, Apple M4 Pro, macOS 26.5.1 (25F80)".
fn heading(facts: &Facts) -> String {
    let release = match facts.system {
        System::Mac => facts.release.as_ref().map(|release| format!("macOS {release}")),
        _ => facts.release.clone(),
    };
    let release = release.map(|release| match &facts.system_build {
        Some(build) => format!("{release} ({build})"),
        None => release,
    });
    let system = match &facts.system {
        System::Other(system) => Some(system.clone()),
        _ => None,
    };
    let parts = [facts.model.clone(), facts.chip.clone(), system, release].into_iter().flatten().collect::<Vec<_>>();
    format!("{}: {}", facts.host, if parts.is_empty() { facts.architecture.clone() } else { parts.join(", ") })
}

fn sockets(discovery: &Discovery, host: usize, ports: &[Port]) -> String {
    let row = |(index, port): (usize, &Port)| {
        let title = port.receptacle.map_or("?".to_owned(), |number| number.to_string());
        let interface = port.interface.clone().unwrap_or_else(|| "?".to_owned());
        let far = |cable: &&crate::cabling::Cable| cable.ends.iter().any(|end| (end.host, end.port) == (host, index));
        let ends: Vec<String> = discovery
            .cabling
            .cables
            .iter()
            .filter(far)
            .map(|cable| {
                let side = 1 - cable.side(host);
                let speed = cable.gigabits.map_or("══".to_owned(), |gigabits| format!("══ {gigabits} Gb/s ══"));
                let through = if cable.through.is_empty() {
                    String::new()
                } else {
                    format!(" through {}", cable.through.join(", "))
                };
                let interface = cable.interfaces[side].as_deref().unwrap_or("?");
                format!("{speed} {} {interface}{through}", discovery.name(cable.ends[side].host))
            })
            .collect();
        let stranger = || {
            discovery.cabling.strangers.iter().find(|stranger| (stranger.end.host, stranger.end.port) == (host, index))
        };
        let end = match (&ends[..], stranger()) {
            ([_, ..], _) => ends.join("; "),
            ([], Some(stranger)) => match &discovery.hosts_of_unknown_ports()[..] {
                [] => format!("── a {} that was not asked", stranger.name),
                mute => format!("── a {}, perhaps {}, which did not tell", stranger.name, mute.join(" or ")),
            },
            ([], None) if !port.others.is_empty() => format!("── {}", port.others.join(", ")),
            ([], None) if port.in_use => "── something".to_owned(),
            ([], None) => "free".to_owned(),
        };
        vec![format!("  Thunderbolt {title}"), interface, end]
    };
    columns(&ports.iter().enumerate().map(row).collect::<Vec<_>>())
}

/// Of a Linux box: interfaces with addresses, and the RDMA devices that go with them.
fn interfaces(facts: &Facts) -> String {
    let device = |name: &str| facts.devices.iter().flatten().find(|device| device.interface.as_deref() == Some(name));
    let row = |interface: &crate::facts::Interface| {
        let addresses: Vec<String> =
            interface.addresses.iter().map(|(address, prefix)| format!("{address}/{prefix}")).collect();
        let speed = interface.megabits.map_or(String::new(), |megabits| format!("{megabits} Mb/s"));
        let rdma =
            device(&interface.name).map_or(String::new(), |device: &VerbsDevice| format!("RDMA {}", device.name));
        vec![format!("  {}", interface.name), addresses.join(" "), speed, rdma]
    };
    let shown =
        facts.interfaces.iter().filter(|interface| !matches!(interface.medium, Medium::Loopback | Medium::Virtual));
    columns(&shown.map(row).collect::<Vec<_>>())
}

/// Who has a cable to whom, by the interfaces of the host in front.
fn table(discovery: &Discovery) -> String {
    let hosts = 0..discovery.hosts.len();
    let mut rows =
        vec![std::iter::once(String::new()).chain(hosts.clone().map(|host| discovery.name(host).to_owned())).collect()];
    for i in hosts.clone() {
        let cell = |j: usize| {
            let interfaces: Vec<&str> =
                discovery.cabling.between(i, j).map(|cable| cable.interface(i).unwrap_or("?")).collect();
            match (i == j, interfaces.is_empty()) {
                (true, _) => "·".to_owned(),
                (false, true) => "-".to_owned(),
                (false, false) => interfaces.join(","),
            }
        };
        rows.push(std::iter::once(discovery.name(i).to_owned()).chain(hosts.clone().map(cell)).collect());
    }
    columns(&rows)
}

/// Rows with columns that are as wide as their widest entry, two spaces apart.
pub(crate) fn columns(rows: &[Vec<String>]) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..count).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:<width$}  ");
        }
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

//! `system_profiler SPThunderboltDataType -json`: the ports of a Mac and what is at the other end
//! of their cables.
//!
//! Each port ("bus") has a domain UUID, and a Mac at the other end of a cable appears under it with
//! the domain UUID of *its* port. A dock or a drive appears there too, without a domain; a Mac
//! behind a dock is below the dock.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::{MAX_ENTRIES, name};

/// The fastest that Thunderbolt 3 and 4 run; 5 runs at 80 or 120. RDMA needs more than 40.
/// (exo-explore/exo pull request 1813.)
pub(super) const THUNDERBOLT_4_GIGABITS: u32 = 40;

/// Apple's RDMA service, as a Mac announces it to the other end: "Service Key: rdma" in the text
/// form. (exo-explore/exo issue 1390; hellas-ai/thunderbolt-ibverbs.)
const RDMA_PROTOCOL: u64 = 64087;

/// Thunderbolt allows six devices in a chain.
const MAX_DEPTH: usize = 8;

/// A Thunderbolt port of a Mac.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// The number of the socket: N of "Thunderbolt N" in `networksetup -listallhardwareports`.
    pub receptacle: Option<u32>,
    /// The domain UUID, in capitals; what a Mac at the other end knows this port by.
    pub domain: String,
    /// The IP interface of this port, such as "en5".
    pub interface: Option<String>,
    /// How fast it is.
    pub speed: Option<Speed>,
    /// Whether something is plugged in.
    pub in_use: bool,
    /// The Macs that are reached through this port: one, unless there is a dock.
    pub far: Vec<Far>,
    /// Devices that are no Macs: docks, drives, displays.
    pub others: Vec<String>,
}

/// A Mac at the other end of a cable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Far {
    /// The domain UUID of the port at the other end, in capitals.
    pub domain: String,
    /// "Mac Studio".
    pub name: String,
    /// The docks between, the nearest first.
    pub through: Vec<String>,
    /// Whether it announces RDMA to us; `None` if it says nothing of its services.
    pub announces_rdma: Option<bool>,
}

/// The speed of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Speed {
    /// Gb/s.
    pub gigabits: u32,
    /// Whether it is what the port could do ("Up to 120 Gb/s"), not what its cable does.
    pub is_limit: bool,
}

/// The ports in the order of their receptacles; `None` if the text is not such a report.
pub(super) fn ports(text: &str, hardware_ports: &BTreeMap<String, String>) -> Option<Vec<Port>> {
    // A line of the system's log may come first. serde_json itself refuses more than 128 levels.
    let start = text.lines().position(|line| line.trim_start().starts_with('{'))?;
    let report: Vec<&str> = text.lines().skip(start).collect();
    let report: Value = serde_json::from_str(&report.join("\n")).ok()?;
    let buses = report.get("SPThunderboltDataType")?.as_array()?;
    let mut ports: Vec<Port> = Vec::new();
    for bus in buses.iter().take(MAX_ENTRIES).filter_map(Value::as_object) {
        if let Some(port) = port(bus, hardware_ports)
            && !ports.iter().any(|other| other.domain == port.domain)
        {
            ports.push(port);
        }
    }
    ports.sort_by_key(|port| (port.receptacle.is_none(), port.receptacle));
    Some(ports)
}

fn port(bus: &Map<String, Value>, hardware_ports: &BTreeMap<String, String>) -> Option<Port> {
    let domain = domain(bus)?;
    let is_socket = |key: &str| key.starts_with("receptacle_") && key.ends_with("_tag");
    let socket = bus.get("receptacle_1_tag").or_else(|| bus.iter().find(|(key, _)| is_socket(key)).map(|(_, tag)| tag));
    let text_of = |key: &str| socket?.get(key)?.as_str();
    // A text in most reports, a number in some.
    let number = |value: &Value| match value {
        Value::String(text) => text.trim().parse().ok(),
        Value::Number(number) => number.as_u64().and_then(|number| u32::try_from(number).ok()),
        _ => None,
    };
    let receptacle = socket.and_then(|socket| number(socket.get("receptacle_id_key")?)).or_else(|| {
        let key = bus.keys().find(|key| is_socket(key))?;
        // Every port calls its socket the first one, but for those that count them.
        let count: u32 = key.trim_start_matches("receptacle_").trim_end_matches("_tag").parse().ok()?;
        (count > 1).then_some(count)
    });
    let interface = receptacle.and_then(|number: u32| hardware_ports.get(&format!("Thunderbolt {number}")).cloned());
    let mut port = Port {
        receptacle,
        domain,
        interface,
        speed: text_of("current_speed_key").and_then(speed),
        in_use: text_of("receptacle_status_key") == Some("receptacle_connected"),
        far: Vec::new(),
        others: Vec::new(),
    };
    walk(bus, &mut Vec::new(), &mut port);
    port.in_use |= !port.far.is_empty() || !port.others.is_empty();
    Some(port)
}

/// Collects what hangs below `parent`; `through` are the devices on the way.
fn walk(parent: &Map<String, Value>, through: &mut Vec<String>, port: &mut Port) {
    let items = parent.get("_items").and_then(Value::as_array).into_iter().flatten();
    for item in items.take(MAX_ENTRIES).filter_map(Value::as_object) {
        if port.far.len() + port.others.len() >= MAX_ENTRIES {
            return;
        }
        let text_of = |key: &str| item.get(key).and_then(Value::as_str).and_then(name);
        let title = text_of("_name").or_else(|| text_of("device_name_key")).unwrap_or_else(|| "a device".to_owned());
        if let Some(domain) = domain(item) {
            let far = Far { domain, name: title, through: through.clone(), announces_rdma: announces_rdma(item) };
            port.far.push(far);
            continue;
        }
        port.others.push(title.clone());
        if through.len() < MAX_DEPTH {
            through.push(title);
            walk(item, through, port);
            through.pop();
        }
    }
}

fn announces_rdma(item: &Map<String, Value>) -> Option<bool> {
    let services = item.get("services_title")?.as_array()?;
    let is_rdma = |service: &Value| service.get("protocol_id_key").and_then(Value::as_u64) == Some(RDMA_PROTOCOL);
    Some(services.iter().take(MAX_ENTRIES).any(is_rdma))
}

fn domain(object: &Map<String, Value>) -> Option<String> {
    let text = object.get("domain_uuid_key")?.as_str()?;
    let fits = text.len() == 36 && text.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
    fits.then(|| text.to_ascii_uppercase())
}

/// "80 Gb/s" or "Up to 120 Gb/s".
fn speed(text: &str) -> Option<Speed> {
    let number = text.strip_prefix("Up to ");
    let gigabits = number.unwrap_or(text).split_whitespace().next()?.parse().ok()?;
    text.contains("Gb/s").then_some(Speed { gigabits, is_limit: number.is_some() })
}

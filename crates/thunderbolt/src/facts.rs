//! What is known of a host, from what its commands printed.
//!
//! Every value may be missing: a command is not there, failed, was cut off, or printed something
//! else. [`Facts::why`] says which. No output, whatever its bytes, makes these readers panic or
//! take long: sizes, counts and depths have limits.

use std::collections::BTreeMap;

use finetune_launch::Transcript;

mod interfaces;
mod machine;
mod thunderbolt;
mod verbs;

#[cfg(test)]
#[path = "../tests/support/damaged_answers.rs"]
mod damaged_answers;
#[cfg(test)]
mod tests;

pub(crate) use interfaces::network;
pub use interfaces::{Interface, Medium};
pub use machine::{Build, Clock, Firewall, Power};
pub use thunderbolt::{Far, Port, Speed};
pub use verbs::{PortState, VerbsDevice};

/// Lists from a host (ports, interfaces, devices) are cut after so many entries.
const MAX_ENTRIES: usize = 128;
/// IPv4 addresses of one interface, likewise: pairs of hosts compare all of them.
const MAX_ADDRESSES: usize = 16;
/// The longest name that is taken over from a host: of a port, a device, a model.
const MAX_NAME_BYTES: usize = 64;

/// The operating system of a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum System {
    /// macOS.
    Mac,
    /// Linux.
    Linux,
    /// What `uname -s` says.
    Other(String),
}

/// One host. Made by [`Facts::from_transcript`]; a pure function of the text.
#[derive(Debug, Clone)]
pub struct Facts {
    /// The name that ssh takes.
    pub host: String,
    /// Its operating system.
    pub system: System,
    /// `uname -m`: "arm64", "x86_64".
    pub architecture: String,
    /// What it calls itself: `uname -n`.
    pub name: Option<String>,
    /// Which machine it is, whatever its names: see [`finetune_rendezvous::identity::machine`].
    pub identity: Option<String>,
    /// Whether the script came to its end.
    pub complete: bool,
    /// "26.5.1" on a Mac, "Debian GNU/Linux 13 (trixie)" on Linux.
    pub release: Option<String>,
    /// A Mac's build, such as "25F80".
    pub system_build: Option<String>,
    /// A Mac's model: "Mac16,11".
    pub model: Option<String>,
    /// The processor: "Apple M4 Pro".
    pub chip: Option<String>,
    /// The memory of the machine.
    pub memory_bytes: Option<u64>,
    /// Free in the folder that was asked about.
    pub disk_free_bytes: Option<u64>,
    /// How its clock compares with this machine's.
    pub clock: Option<Clock>,
    /// `finetune --version` and the checksum of the program.
    pub finetune: Option<Build>,
    /// The address of this host that our ssh connection came in at.
    pub way_in: Option<std::net::IpAddr>,
    /// Its network interfaces.
    pub interfaces: Vec<Interface>,
    /// A Mac's Thunderbolt ports, by receptacle; `None` if nothing could be read.
    pub ports: Option<Vec<Port>>,
    /// RDMA devices; `None` if it is not known whether there are any.
    pub devices: Option<Vec<VerbsDevice>>,
    /// What `rdma_ctl status` says, on a Mac.
    pub rdma_enabled: Option<bool>,
    /// Whether the verbs library is there, on Linux.
    pub verbs_library: Option<bool>,
    /// Linux: device files that this user may not open.
    pub refused_device_files: Vec<String>,
    /// `ulimit -l` on Linux; `u64::MAX` for unlimited.
    pub lockable_bytes: Option<u64>,
    /// `ulimit -n`; `u64::MAX` for unlimited.
    pub open_files: Option<u64>,
    /// A Mac's power settings.
    pub power: Option<Power>,
    /// Its firewall.
    pub firewall: Option<Firewall>,
    /// TCP ports that something listens on.
    pub listening: Option<Vec<u16>>,
    /// A Mac's routes to single addresses, with the interface that each leads through.
    pub host_routes: Vec<(std::net::Ipv4Addr, String)>,
    /// Whether `sudo` works without a password; `None` if it was not asked.
    pub root: Option<bool>,
    missing: BTreeMap<&'static str, String>,
}

impl Facts {
    /// `arrived`: when the answer began to come, in seconds since 1970 by this machine's clock.
    pub fn from_transcript(host: &str, transcript: &Transcript, arrived: f64) -> Self {
        let mut reader = Reader { transcript, missing: BTreeMap::new() };
        let (system, architecture) = reader
            .read("system", |text| {
                let mut words = text.split_whitespace();
                let (system, _release, machine) = (words.next()?, words.next()?, words.next()?);
                let system = match system {
                    "Darwin" => System::Mac,
                    "Linux" => System::Linux,
                    other => System::Other(name(other)?),
                };
                Some((system, name(machine)?))
            })
            .unwrap_or_else(|| (System::Other("unknown".into()), String::new()));
        let mut facts = Self {
            host: host.to_owned(),
            system,
            architecture,
            name: reader.read("name", |text| name(text.trim())),
            identity: reader.read("identity", finetune_rendezvous::identity::plain),
            complete: transcript.complete,
            release: None,
            system_build: None,
            model: None,
            chip: None,
            memory_bytes: None,
            disk_free_bytes: reader.read("disk", machine::disk_free),
            clock: reader.read("clock", |text| machine::clock(text, arrived)),
            finetune: None,
            way_in: reader.read("login", machine::way_in),
            interfaces: Vec::new(),
            ports: None,
            devices: None,
            rdma_enabled: None,
            verbs_library: None,
            refused_device_files: Vec::new(),
            lockable_bytes: None,
            open_files: reader.read("files", |text| machine::limit(text, 1)),
            power: None,
            firewall: None,
            listening: None,
            host_routes: Vec::new(),
            root: None,
            missing: BTreeMap::new(),
        };
        let version = reader.read("version", machine::version);
        let checksum = reader.read("binary", machine::checksum);
        facts.finetune = version.map(|version| Build { version, checksum });
        match facts.system {
            System::Mac => facts.read_mac(&mut reader),
            System::Linux => facts.read_linux(&mut reader),
            System::Other(_) => {}
        }
        facts.missing = reader.missing;
        facts
    }

    fn read_mac(&mut self, reader: &mut Reader<'_>) {
        let release = reader.read("release", machine::mac_release);
        (self.release, self.system_build) = release.unzip();
        if let Some(hardware) = reader.read_any("hardware", machine::mac_hardware) {
            (self.model, self.chip, self.memory_bytes) = hardware;
        }
        let hardware_ports = reader.read("ports", interfaces::hardware_ports).unwrap_or_default();
        self.interfaces =
            reader.read("interfaces", |text| interfaces::ifconfig(text, &hardware_ports)).unwrap_or_default();
        self.ports = reader.read("thunderbolt", |text| thunderbolt::ports(text, &hardware_ports));
        self.rdma_enabled = reader.read_any("rdma", verbs::rdma_enabled);
        let details = reader.read_any("device_details", verbs::ibv_devinfo).unwrap_or_default();
        self.devices = reader.read_any("devices", |text| verbs::ibv_devices(text, &details));
        self.power = reader.read("power", machine::power);
        self.firewall = reader.read_any("firewall", machine::mac_firewall);
        self.listening = reader.read_any("listening", machine::listening);
        self.host_routes = reader.read("routes", interfaces::host_routes).unwrap_or_default();
        self.root = reader.status("root").map(|status| status == 0);
    }

    fn read_linux(&mut self, reader: &mut Reader<'_>) {
        self.release = reader.read("release", machine::linux_release);
        self.memory_bytes = reader.read("memory", machine::linux_memory);
        let links = reader.read("links", interfaces::links).unwrap_or_default();
        self.interfaces = reader.read("interfaces", |text| interfaces::ip_addresses(text, &links)).unwrap_or_default();
        self.devices = reader.read_any("infiniband", verbs::infiniband);
        self.verbs_library = reader.status("library").map(|status| status == 0);
        self.refused_device_files = reader.read_any("character_devices", verbs::refused_files).unwrap_or_default();
        self.lockable_bytes = reader.read("locked", |text| machine::limit(text, 1024));
        self.firewall = reader.read_any("firewall", machine::linux_firewall);
        self.listening = reader.read_any("listening", machine::listening);
    }

    /// Why a fact is missing: of the section of the script that would have told it.
    pub fn why(&self, section: &str) -> &str {
        self.missing.get(section).map_or("it was not asked", String::as_str)
    }

    /// The interface of this name.
    pub fn interface(&self, name: &str) -> Option<&Interface> {
        self.interfaces.iter().find(|interface| interface.name == name)
    }

    /// The RDMA device of an interface.
    pub fn device_of(&self, interface: &str) -> Option<&VerbsDevice> {
        self.devices.iter().flatten().find(|device| device.interface.as_deref() == Some(interface))
    }

    /// A Mac's version as two numbers, such as (26, 5).
    pub fn mac_version(&self) -> Option<(u32, u32)> {
        let mut parts = self.release.as_deref()?.split('.');
        Some((parts.next()?.parse().ok()?, parts.next().unwrap_or("0").parse().ok()?))
    }

    /// Whether any port is of the fifth generation; `None` if it is not known.
    pub fn has_thunderbolt_5(&self) -> Option<bool> {
        let ports = self.ports.as_ref()?;
        let speeds = || ports.iter().filter_map(|port| port.speed);
        match speeds().any(|speed| speed.gigabits > thunderbolt::THUNDERBOLT_4_GIGABITS) {
            true => Some(true),
            // A port that a slower device hangs on tells the speed of that device.
            false => speeds().any(|speed| speed.is_limit).then_some(false),
        }
    }
}

/// Hands sections to their readers and keeps why one has no value.
struct Reader<'a> {
    transcript: &'a Transcript,
    missing: BTreeMap<&'static str, String>,
}

impl Reader<'_> {
    /// The value of a section whose command succeeded.
    fn read<T>(&mut self, section: &'static str, read: impl FnOnce(&str) -> Option<T>) -> Option<T> {
        let why = match self.transcript.section(section) {
            None => "its host did not get to it in time, or does not know it".to_owned(),
            Some(found) => match found.status {
                None => "the command did not end in time".to_owned(),
                Some(0) => match read(&found.text) {
                    Some(value) => return Some(value),
                    None => format!("its output cannot be understood: {}", excerpt(&found.text)),
                },
                Some(126 | 127) => "there is no such command".to_owned(),
                Some(status) => format!("the command failed with status {status}: {}", excerpt(&found.text)),
            },
        };
        self.missing.insert(section, why);
        None
    }

    /// As `read`, for commands whose status says nothing: their text does.
    fn read_any<T>(&mut self, section: &'static str, read: impl FnOnce(&str) -> Option<T>) -> Option<T> {
        let ended = |status: Option<i32>| status.is_some_and(|status| !matches!(status, 126 | 127));
        let Some(found) = self.transcript.section(section).filter(|found| ended(found.status)) else {
            return self.read(section, |_| None);
        };
        let value = read(&found.text);
        if value.is_none() {
            self.missing.insert(section, format!("its output does not tell: {}", excerpt(&found.text)));
        }
        value
    }

    fn status(&mut self, section: &'static str) -> Option<i32> {
        let status = self.transcript.section(section)?.status;
        if status.is_none() {
            self.missing.insert(section, "the command did not end in time".to_owned());
        }
        status
    }
}

/// A name out of an output, if it can stand in a message, a drawing and a command: 1 to 64 letters
/// without control characters.
fn name(text: &str) -> Option<String> {
    let fits = !text.is_empty() && text.len() <= MAX_NAME_BYTES && !text.chars().any(char::is_control);
    fits.then(|| text.to_owned())
}

/// The name of an interface or a device, which goes into commands: letters, digits, '_', '.', '-'
/// and not in front '-'.
fn plain_name(text: &str) -> Option<String> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    let fits = !text.starts_with(['-', '.']) && text.bytes().all(is_plain);
    name(text).filter(|_| fits)
}

fn excerpt(text: &str) -> String {
    let short: String = text.trim().chars().take(80).collect();
    format!("{short:?}")
}

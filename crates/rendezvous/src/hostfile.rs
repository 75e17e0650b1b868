//! MLX's hostfile: the hosts of a cluster, in the order of their ranks.
//!
//! ```json
//! {"backend": "jaccl",
//!  "envs": ["MLX_METAL_FAST_SYNCH=1"],
//!  "hosts": [{"ssh": "mini-1", "ips": ["10.0.0.1"], "rdma": [null, "rdma_en2"]},
//!            {"ssh": "mini-2", "ips": ["10.0.0.2"], "rdma": ["rdma_en2", null]}]}
//! ```
//!
//! The list of hosts alone is a hostfile too. As in MLX, only "hosts" and "ssh" are required, and
//! unknown keys are ignored. So every file that mlx.launch takes is taken here.
//! (ml-explore/mlx, python/mlx/_distributed_utils/common.py, `Hostfile.from_file`.)

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use finetune_advice::Advice;
use finetune_allreduce::{DeviceMatrix, DeviceMatrixError, WiresError, wires_from_json, wires_to_json};
use serde_json::{Map, Value, json};

use crate::this_host::{is_loopback, machine_name};

mod addresses;
mod odd_keys;
#[cfg(test)]
mod tests;

/// Longer hostfiles are refused.
pub const MAX_HOSTFILE_BYTES: usize = 1 << 20;
/// Hostfiles with more hosts are refused.
pub const MAX_HOSTS: usize = 1024;
/// More entries than any host needs.
const MAX_LIST: usize = 256;
/// A DNS name has at most 253 bytes; a user and an '@' may stand before it.
const MAX_NAME_BYTES: usize = 320;

/// The hosts of a cluster, and the variables to set on them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Hostfile {
    /// As written: "ring", "jaccl", "jaccl-ring" and others of MLX.
    pub backend: Option<String>,
    /// Variables to set for every rank, in the order of the file.
    pub environment: Vec<(String, String)>,
    /// At least one.
    pub hosts: Vec<Host>,
    /// Notes about ignored keys that look as if they were meant.
    pub notices: Vec<String>,
}

/// A host of a hostfile. Its place in the list is its rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// What ssh connects to: a name, an address or an alias of ~/.ssh/config. Never an option: it
    /// does not start with '-' and has no white space.
    pub ssh: String,
    /// Addresses under which the other hosts reach this one, the best first; may be empty.
    pub ips: Vec<String>,
    /// The RDMA devices that lead to each host, an empty list for none. Empty as a whole if the
    /// file has no "rdma".
    pub rdma: Vec<Vec<String>>,
}

/// What is wrong with a hostfile. Hosts are counted from 0, as ranks are.
#[derive(Debug, thiserror::Error)]
pub enum HostfileError {
    /// The file cannot be read.
    #[error("the hostfile {} cannot be read: {source}", path.display())]
    Unreadable {
        /// The hostfile.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// One of the others, with the file that it is in.
    #[error("{}: {problem}", path.display())]
    In {
        /// The hostfile.
        path: PathBuf,
        /// What is wrong with it.
        problem: Box<HostfileError>,
    },
    /// The text is longer than [`MAX_HOSTFILE_BYTES`].
    #[error("{bytes} bytes are too long for a hostfile, the limit is {MAX_HOSTFILE_BYTES}")]
    TooLong {
        /// Its bytes.
        bytes: usize,
    },
    /// The text is not JSON.
    #[error("the hostfile is not JSON: {source}")]
    Syntax {
        /// Where, and why.
        source: serde_json::Error,
    },
    /// A list of names, as MPI and DeepSpeed take it.
    #[error("the hostfile is a plain list of {} names, not MLX's JSON", names.len())]
    PlainList {
        /// The names, without slots.
        names: Vec<String>,
    },
    /// The JSON is neither an object nor a list.
    #[error("the hostfile is {found}, not an object with \"hosts\" and not a list of hosts")]
    NotHosts {
        /// What it is, as "a number".
        found: &'static str,
    },
    /// A key that must be there is missing.
    #[error("the hostfile has no {key:?}")]
    NoKey {
        /// Its name.
        key: &'static str,
    },
    /// The value of a key of the file is wrong.
    #[error("{key:?} of the hostfile: {what}")]
    Key {
        /// Its name.
        key: &'static str,
        /// What is wrong.
        what: String,
    },
    /// A host is not an object.
    #[error("host {host} is {found}, not an object with \"ssh\"")]
    NotAHost {
        /// The host.
        host: usize,
        /// What it is, as "a number".
        found: &'static str,
    },
    /// A host has no name for ssh.
    #[error("host {host} has no \"ssh\"")]
    NoSsh {
        /// The host.
        host: usize,
    },
    /// The value of a key of a host is wrong.
    #[error("{key:?} of host {host}: {what}")]
    HostKey {
        /// The host.
        host: usize,
        /// The name of the key.
        key: &'static str,
        /// What is wrong.
        what: String,
    },
    /// A cell of a host's row of RDMA devices.
    #[error("\"rdma\" of host {host}, entry {peer}: {source}")]
    Rdma {
        /// The host.
        host: usize,
        /// The entry: the host at the other end.
        peer: usize,
        /// What is wrong with it.
        source: WiresError,
    },
    /// Some hosts have a row of RDMA devices and this one has none.
    #[error("host {host} ({ssh}) has no \"rdma\", but other hosts have")]
    NoRdma {
        /// The host.
        host: usize,
        /// Its name for ssh.
        ssh: String,
    },
    /// The rows of RDMA devices do not fit together.
    #[error("\"rdma\" of the hosts: {source}")]
    Devices {
        /// How they do not fit.
        source: DeviceMatrixError,
    },
}

impl Advice for HostfileError {
    fn hints(&self) -> Vec<String> {
        let hint = match self {
            Self::In { problem, .. } => return problem.hints(),
            Self::PlainList { names } => return vec![plain_list_as_json(names)],
            Self::Unreadable { source, .. } if source.kind() == io::ErrorKind::InvalidData => {
                "save it as UTF-8 text; some editors write UTF-16"
            }
            Self::Unreadable { .. } => "check the path; `finetune cluster discover` writes a hostfile",
            Self::HostKey { key: "ssh", .. } => {
                "\"ssh\" is the name that `ssh NAME` takes, without options; options belong in ~/.ssh/config"
            }
            Self::HostKey { key: "ips", .. } => {
                "\"ips\" is a list of addresses, such as [\"10.0.0.1\"]; the port is not part of it"
            }
            Self::HostKey { .. } | Self::Rdma { .. } => {
                "\"rdma\" is a list with an entry for each host: null for itself, else a device such as \"rdma_en2\" or a list of devices"
            }
            Self::NoRdma { .. } => "give every host its \"rdma\", or remove it from all to train over TCP",
            Self::Devices { source } => return source.hints(),
            Self::Key { key: "envs", .. } => "\"envs\" is a list such as [\"NAME=value\"]",
            _ => {
                "a hostfile looks like {\"hosts\": [{\"ssh\": \"mini-1\", \"ips\": [\"10.0.0.1\"]}]}; `finetune cluster discover` writes one"
            }
        };
        vec![hint.to_owned()]
    }
}

impl Hostfile {
    /// Reads a file of at most [`MAX_HOSTFILE_BYTES`].
    ///
    /// # Errors
    ///
    /// The file cannot be read, or [`HostfileError::In`] with what [`Hostfile::parse`] says of it.
    pub fn load(path: &Path) -> Result<Self, HostfileError> {
        let mut text = String::new();
        // One byte above the limit is enough to see that it is exceeded.
        File::open(path)
            .and_then(|file| file.take(MAX_HOSTFILE_BYTES as u64 + 1).read_to_string(&mut text))
            .map_err(|source| HostfileError::Unreadable { path: path.to_path_buf(), source })?;
        Self::parse(&text).map_err(|problem| HostfileError::In { path: path.to_path_buf(), problem: Box::new(problem) })
    }

    /// Reads the text of a hostfile. Whether the RDMA devices fit together is not checked: see
    /// [`Hostfile::devices`].
    ///
    /// # Errors
    ///
    /// The text is too long, not JSON, lacks a key, or has a value of another form.
    pub fn parse(text: &str) -> Result<Self, HostfileError> {
        if text.len() > MAX_HOSTFILE_BYTES {
            return Err(HostfileError::TooLong { bytes: text.len() });
        }
        // Editors of Windows put a byte order mark in front.
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let value: Value = serde_json::from_str(text).map_err(|source| match plain_list(text) {
            Some(names) => HostfileError::PlainList { names },
            None => HostfileError::Syntax { source },
        })?;
        let notices = odd_keys::notices(&value);
        match &value {
            Value::Array(list) => Ok(Self { hosts: hosts(list)?, notices, ..Self::default() }),
            Value::Object(object) => {
                let list = object.get("hosts").ok_or(HostfileError::NoKey { key: "hosts" })?;
                let list =
                    list.as_array().ok_or_else(|| fault("hosts", format!("it is {}, not a list", kind(list))))?;
                let (backend, environment) = (backend(object)?, environment(object)?);
                Ok(Self { backend, environment, hosts: hosts(list)?, notices })
            }
            other => Err(HostfileError::NotHosts { found: kind(other) }),
        }
    }

    /// The text that [`Hostfile::parse`] reads back to the same hosts, with a line for each.
    pub fn to_json(&self) -> String {
        let host = |host: &Host| {
            let rdma: Vec<Value> = host.rdma.iter().map(|names| wires_to_json(names)).collect();
            format!("    {}", json!({"ssh": host.ssh, "ips": host.ips, "rdma": rdma}))
        };
        let variables: Vec<String> = self.environment.iter().map(|(name, value)| format!("{name}={value}")).collect();
        format!(
            "{{\n  \"backend\": {},\n  \"envs\": {},\n  \"hosts\": [\n{}\n  ]\n}}\n",
            json!(self.backend.as_deref().unwrap_or_default()),
            json!(variables),
            self.hosts.iter().map(host).collect::<Vec<_>>().join(",\n"),
        )
    }

    /// The RDMA devices between the hosts; `None` if no host has any.
    ///
    /// # Errors
    ///
    /// Only some of the hosts have devices, or the rows of devices do not fit together.
    pub fn devices(&self) -> Result<Option<DeviceMatrix>, HostfileError> {
        if self.hosts.iter().all(|host| host.rdma.is_empty()) {
            return Ok(None);
        }
        if let Some(host) = self.hosts.iter().position(|host| host.rdma.is_empty()) {
            return Err(HostfileError::NoRdma { host, ssh: self.hosts[host].ssh.clone() });
        }
        let rows = self.hosts.iter().map(|host| host.rdma.clone()).collect();
        DeviceMatrix::new(rows).map(Some).map_err(|source| HostfileError::Devices { source })
    }

    /// The address at which the ranks can meet: the first one of host 0 that leads there from
    /// elsewhere, or else the first one.
    pub fn coordinator(&self) -> Option<&str> {
        let ips = &self.hosts.first()?.ips;
        ips.iter().find(|address| !is_loopback(address)).or(ips.first()).map(String::as_str)
    }

    /// The address of host 0, if it leads every other host to itself, and the file names other
    /// hosts.
    pub fn lost_coordinator(&self) -> Option<&str> {
        let address = |host: &'_ Host| host.ips.iter().find(|ip| !is_loopback(ip)).or(host.ips.first()).cloned();
        let leads_here =
            |host: &Host| is_loopback(&address(host).unwrap_or_else(|| machine_name(&host.ssh).to_owned()));
        let (first, others) = self.hosts.split_first()?;
        let lost = leads_here(first) && others.iter().any(|host| !leads_here(host));
        lost.then(|| self.coordinator().unwrap_or_else(|| machine_name(&first.ssh)))
    }
}

/// The names of a list as MPI, MPICH, DeepSpeed, Horovod and Slurm take it: one per line or between
/// commas, perhaps with slots; `None` if it is none.
fn plain_list(text: &str) -> Option<Vec<String>> {
    let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default());
    // The commas of Slurm's gpu[01-03,07] are within a name.
    let entries = lines.flat_map(|line| line.split(move |letter: char| letter == ',' && !line.contains('[')));
    let names = entries.map(str::trim).filter(|entry| !entry.is_empty()).map(|entry| {
        let mut words = entry.split_whitespace();
        let name = words.next()?;
        let plain = |letter: char| letter.is_alphanumeric() || "._-@:[]%,".contains(letter);
        let is_name = name.chars().all(plain) && name.starts_with(char::is_alphanumeric) && name_fault(name).is_none();
        // "box-1:2" of MPICH: a number of processes.
        let name = match name.rsplit_once(':') {
            Some((host, count)) if !host.contains(':') && count.parse::<u32>().is_ok() => host,
            _ => name,
        };
        (is_name && words.all(|word| word.contains('='))).then(|| name.to_owned())
    });
    let names: Vec<String> = names.collect::<Option<_>>()?;
    (!names.is_empty() && names.len() <= MAX_HOSTS).then_some(names)
}

fn plain_list_as_json(names: &[String]) -> String {
    const SHOWN: usize = 16;
    if names.iter().any(|name| name.contains('[')) {
        return "`scontrol show hostnames LIST` writes the hosts of Slurm's list one by one; in MLX's form they are [{\"ssh\": \"gpu01\"}, …], with one rank per host".to_owned();
    }
    let hosts: Vec<String> = names.iter().take(SHOWN).map(|name| json!({"ssh": name}).to_string()).collect();
    let more = if names.len() > SHOWN { ", …" } else { "" };
    format!("in MLX's form, with one rank per host, it is [{}{more}]", hosts.join(", "))
}

fn backend(object: &Map<String, Value>) -> Result<Option<String>, HostfileError> {
    match object.get("backend") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(name)) if name.is_empty() => Ok(None),
        Some(Value::String(name)) => match name_fault(name) {
            None => Ok(Some(name.clone())),
            Some(what) => Err(fault("backend", format!("{} {what}", shown(name)))),
        },
        Some(other) => Err(fault("backend", format!("it is {}, not a string", kind(other)))),
    }
}

fn environment(object: &Map<String, Value>) -> Result<Vec<(String, String)>, HostfileError> {
    let list = match object.get("envs") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(fault("envs", format!("it is {}, not a list", kind(other)))),
    };
    if list.len() > MAX_LIST {
        return Err(fault("envs", format!("{} entries, the limit is {MAX_LIST}", list.len())));
    }
    let variable = |value: &Value| {
        let text = value.as_str().ok_or_else(|| fault("envs", format!("{} is not a string", kind(value))))?;
        // Without a '=' mlx.launch sets an empty value.
        let (name, value) = text.split_once('=').unwrap_or((text, ""));
        let is_name = |name: &str| {
            name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
                && name.bytes().next().is_some_and(|byte| !byte.is_ascii_digit())
        };
        if !is_name(name) {
            return Err(fault("envs", format!("{} is not the name of a variable", shown(name))));
        }
        if value.contains('\0') {
            return Err(fault("envs", format!("the value of {name} has a zero byte")));
        }
        Ok((name.to_owned(), value.to_owned()))
    };
    list.iter().map(variable).collect()
}

fn hosts(list: &[Value]) -> Result<Vec<Host>, HostfileError> {
    if list.is_empty() {
        return Err(fault("hosts", "there are none".to_owned()));
    }
    if list.len() > MAX_HOSTS {
        return Err(fault("hosts", format!("{} hosts, the limit is {MAX_HOSTS}", list.len())));
    }
    list.iter().enumerate().map(|(index, value)| host(index, value)).collect()
}

fn host(host: usize, value: &Value) -> Result<Host, HostfileError> {
    let fault = |key: &'static str, what: String| HostfileError::HostKey { host, key, what };
    let Value::Object(object) = value else {
        return Err(HostfileError::NotAHost { host, found: kind(value) });
    };
    let name = |key: &'static str, value: &Value| match value {
        Value::String(name) => match name_fault(name) {
            None => Ok(name.clone()),
            Some(what) => Err(fault(key, format!("{} {what}", shown(name)))),
        },
        other => Err(fault(key, format!("{} is not a string", kind(other)))),
    };
    let list = |key: &'static str| match object.get(key) {
        None | Some(Value::Null) => Ok(&[][..]),
        Some(Value::Array(list)) if list.len() > MAX_LIST => {
            Err(fault(key, format!("{} entries, the limit is {MAX_LIST}", list.len())))
        }
        Some(Value::Array(list)) => Ok(&list[..]),
        Some(other) => Err(fault(key, format!("it is {}, not a list", kind(other)))),
    };
    let ssh = name("ssh", object.get("ssh").ok_or(HostfileError::NoSsh { host })?)?;
    if !ssh.starts_with("ssh://") && addresses::has_port(machine_name(&ssh)) {
        return Err(fault("ssh", format!("{} has a port, which belongs in ~/.ssh/config", shown(&ssh))));
    }
    let ip = |value: &Value| {
        let ip = name("ips", value)?;
        match addresses::fault_of(&ip) {
            None => Ok(ip),
            Some(what) => Err(fault("ips", format!("{}{what}", shown(&ip)))),
        }
    };
    let ips = list("ips")?.iter().map(ip).collect::<Result<_, _>>()?;
    let wires = |(peer, cell)| wires_from_json(cell).map_err(|source| HostfileError::Rdma { host, peer, source });
    let rdma = list("rdma")?.iter().enumerate().map(wires).collect::<Result<_, _>>()?;
    Ok(Host { ssh, ips, rdma })
}

/// Why a text cannot be a name on a command line; `None` if it can.
pub fn name_fault(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        return Some("is empty");
    }
    if name.len() > MAX_NAME_BYTES {
        return Some("is longer than 320 bytes");
    }
    // `ssh -oProxyCommand=…` runs a program of the hostfile's choice.
    if name.starts_with('-') {
        return Some("starts with '-' and would be taken for an option");
    }
    if name.chars().any(|letter| letter.is_whitespace() || letter.is_control()) {
        return Some("has white space or a control character");
    }
    None
}

fn fault(key: &'static str, what: String) -> HostfileError {
    HostfileError::Key { key, what }
}

/// A text of the file as it may stand in a message: quoted, on one line and not longer than one.
fn shown(text: &str) -> String {
    const LONGEST: usize = 64;
    let short: String = text.chars().take(LONGEST).collect();
    let dots = if short.len() < text.len() { "…" } else { "" };
    format!("{short:?}{dots}")
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

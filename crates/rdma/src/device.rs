//! Devices: opened by name, held to their limits before the driver is asked, and what their one
//! port says.

use std::collections::BTreeMap;
use std::net::Ipv6Addr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use serde::Serialize;

use crate::error::{RdmaError, os_text};
use crate::layout::{MTU_4096, PORT_ACTIVE};
use crate::library::library;
use crate::offer::{QueuePairKind, address_text};
use crate::slots::{FRAME_BYTES, LEAST_DEPTH, Lane};
use crate::verbs::{Context, Domain, Failed, Memory, QueuePair, QueuePairShape};

/// The most bytes that are registered at once: regions above 4 GiB were reported to corrupt data on
/// macOS.
const LARGEST_MEMORY: usize = 1 << 30;

/// What a device may be asked for. This program refuses more by itself, because a driver's refusal
/// (or silence) says less.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Queue pairs of this process on one device.
    pub queue_pairs: usize,
    /// Registered memory regions of this process on one device.
    pub memory_regions: usize,
    /// Bytes of one message.
    pub message_bytes: usize,
    /// 4 KiB frames of all messages posted to one direction of a queue pair.
    pub frames_in_flight: usize,
}

impl Limits {
    /// Apple's Thunderbolt devices.
    pub fn apple() -> Limits {
        Limits {
            queue_pairs: 10,     // TN3205; the eleventh is EBUSY (mlx#4209)
            memory_regions: 100, // mlx#3162
            message_bytes: 4095 * FRAME_BYTES,
            // TN3205 has 4095 work requests, but the 64th receive of 64 KiB was refused, whatever
            // depth had been reported (thunderbolt-ibverbs#41): 63 x 16.
            frames_in_flight: 1008,
        }
    }

    /// What the device says of itself; Apple's limits on a Mac.
    fn of_device(context: &Context, message_bytes: u32) -> Limits {
        if cfg!(target_os = "macos") {
            return Limits::apple();
        }
        let known = |value: i32| usize::try_from(value).ok().filter(|&value| value > 0);
        let attributes = context.attributes();
        let attribute = |value: Option<i32>| value.and_then(known).unwrap_or(usize::MAX);
        Limits {
            queue_pairs: attribute(attributes.as_ref().map(|attributes| attributes.max_qp)),
            memory_regions: attribute(attributes.as_ref().map(|attributes| attributes.max_mr)),
            message_bytes: if message_bytes == 0 { usize::MAX } else { message_bytes as usize },
            frames_in_flight: attribute(attributes.as_ref().map(|attributes| attributes.max_qp_wr)),
        }
    }
}

/// A device of this machine, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RdmaDevice {
    /// Its name.
    pub name: String,
    /// Its address and the largest packet in bytes, if it can be used.
    pub port: Option<(String, usize)>,
    /// Why it cannot, and what to do.
    pub problem: Option<String>,
}

/// The RDMA devices of this machine. Opens each for a moment, so a process with open wires must not
/// call it: opening a device twice was reported to hang on macOS (mlx#3245).
///
/// # Errors
/// If there is no verbs library or no kernel with RDMA.
pub fn rdma_devices() -> Result<Vec<RdmaDevice>, RdmaError> {
    let names = library()?.device_names().map_err(|failed| failed_on("", failed))?;
    let describe = |name: String| {
        let read = open(&name).and_then(|context| read_port(&name, &context));
        let problem = read.as_ref().err().map(RdmaError::to_string);
        RdmaDevice { name, port: read.ok().map(|port| (address_text(port.gid), port.mtu)), problem }
    };
    Ok(names.into_iter().map(describe).collect())
}

/// What the port of a device says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Port {
    pub(crate) lid: u16,
    pub(crate) gid: Ipv6Addr,
    pub(crate) gid_index: u8,
    /// Largest packet in bytes.
    pub(crate) mtu: usize,
    message_bytes: u32,
}

/// What the wires of one rank ask of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Demand {
    pub(crate) queue_pairs: usize,
    pub(crate) memory_bytes: usize,
    /// The largest message.
    pub(crate) message_bytes: usize,
    /// The most frames in one direction of a queue pair.
    pub(crate) frames: usize,
}

impl Demand {
    /// Refuses what is beyond the limits, `held` being what this process has already.
    fn check(&self, device: &str, limits: &Limits, held: Held) -> Result<(), RdmaError> {
        let refuse = |what, wanted: usize, limit: usize, advice| {
            let device = device.to_string();
            if wanted <= limit {
                return Ok(());
            }
            Err(RdmaError::Limit { device, what, wanted: wanted as u64, limit: limit as u64, advice })
        };
        refuse(
            "queue pairs (two for each wire)",
            held.queue_pairs + self.queue_pairs,
            limits.queue_pairs,
            "use fewer wires on this device, or a ring, which needs wires to two neighbours only",
        )?;
        refuse(
            "memory regions (one for each group)",
            held.memory_regions + 1,
            limits.memory_regions,
            "leave other groups of this process first",
        )?;
        refuse("bytes in one message", self.message_bytes, limits.message_bytes, "use smaller bulk slots")?;
        refuse("frames of 4 KiB in one queue", self.frames, limits.frames_in_flight, "use fewer or smaller slots")?;
        refuse(
            "bytes of registered memory",
            self.memory_bytes,
            LARGEST_MEMORY,
            "use fewer or smaller slots, or fewer wires on this device",
        )
    }
}

/// What this process has of a device.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    queue_pairs: usize,
    memory_regions: usize,
}

/// What this process has of all devices: limits hold for all [`crate::Wires`] of it together.
fn held() -> MutexGuard<'static, BTreeMap<String, Held>> {
    static HELD: Mutex<BTreeMap<String, Held>> = Mutex::new(BTreeMap::new());
    HELD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A share of a device's limits, given back when dropped.
#[derive(Debug)]
struct Share {
    device: String,
    queue_pairs: usize,
}

impl Share {
    fn take(device: &str, limits: &Limits, demand: &Demand) -> Result<Share, RdmaError> {
        let mut all = held();
        let held = all.entry(device.to_string()).or_default();
        demand.check(device, limits, *held)?;
        held.queue_pairs += demand.queue_pairs;
        held.memory_regions += 1;
        Ok(Share { device: device.to_string(), queue_pairs: demand.queue_pairs })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if let Some(held) = held().get_mut(&self.device) {
            held.queue_pairs -= self.queue_pairs;
            held.memory_regions -= 1;
        }
    }
}

/// What a [`crate::Wires`] has of a device. Dropped after its queue pairs.
pub(crate) struct Device {
    pub(crate) name: String,
    pub(crate) port: Port,
    memory: Arc<Memory>,
    _share: Share,
}

impl Device {
    /// Opens a device with the memory of all its queue pairs. Without `limits` its own hold.
    pub(crate) fn open(name: &str, demand: &Demand, limits: Option<&Limits>) -> Result<Device, RdmaError> {
        let domain = domain(name)?;
        let port = read_port(name, domain.context())?;
        let limits = limits.copied().unwrap_or_else(|| Limits::of_device(domain.context(), port.message_bytes));
        let share = Share::take(name, &limits, demand)?;
        let memory = Memory::register(domain, demand.memory_bytes).map_err(|failed| failed_on(name, failed))?;
        Ok(Device { name: name.to_string(), port, memory, _share: share })
    }

    /// A queue pair ready for receives to be posted, with slots for `depth` messages each way, and
    /// its real depth: drivers may give less.
    pub(crate) fn queue_pair(
        &self,
        kind: QueuePairKind,
        lane: Lane,
        depth: usize,
        slot_bytes: usize,
    ) -> Result<(QueuePair, usize), RdmaError> {
        let failed = |failed| failed_on(&self.name, failed);
        let (slots, frames) = (lane.slots(depth), slot_bytes / FRAME_BYTES);
        let part = self.memory.part(2 * slots * slot_bytes);
        let posts = (slots * frames) as u32;
        let shape = QueuePairShape { reliable: kind == QueuePairKind::Reliable, sends: posts, receives: posts };
        let mut pair = QueuePair::create(part, shape).map_err(failed)?;
        pair.initialise().map_err(failed)?;
        let real = pair.depth().map(|(sends, receives)| sends.min(receives) as usize).filter(|&frames| frames > 0);
        let real_slots = real.map_or(slots, |posts| posts / frames).min(slots);
        let real_depth = real_slots.saturating_sub(lane.slots(0));
        if real_depth < LEAST_DEPTH {
            return Err(RdmaError::Limit {
                device: self.name.clone(),
                what: "frames of 4 KiB in one queue",
                wanted: (lane.slots(LEAST_DEPTH) * frames) as u64,
                limit: real.unwrap_or(0) as u64,
                advice: "use smaller bulk slots",
            });
        }
        Ok((pair, real_depth))
    }
}

/// Names the device of a failed call.
pub(crate) fn failed_on(device: &str, failed: Failed) -> RdmaError {
    if failed.call == "ibv_get_device_list" {
        let because = format!("the kernel does not tell its RDMA devices: {}", os_text(failed.errno));
        return RdmaError::Unavailable { because, advice: WHERE_DEVICES_COME_FROM };
    }
    RdmaError::call(device, failed.call, failed.errno)
}

/// What to do if there is no device.
const WHERE_DEVICES_COME_FROM: &str = if cfg!(target_os = "macos") {
    "it needs Thunderbolt 5, macOS 26.2, and `rdma_ctl enable` once in Recovery (`rdma_ctl status` tells); or use `tcp`"
} else {
    "it needs a network card with RDMA, or soft-RoCE (`modprobe rdma_rxe`, `rdma link add rxe0 type rxe netdev eth0`); or \
     use `tcp`"
};

/// The domain of the device of that name, which all wires of this process share: opening a device twice was
/// reported to hang on macOS (mlx#3245), and it has about 11 domains until it restarts.
fn domain(name: &str) -> Result<Arc<Domain>, RdmaError> {
    static OPEN: Mutex<BTreeMap<String, Weak<Domain>>> = Mutex::new(BTreeMap::new());
    let mut all = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(domain) = all.get(name).and_then(Weak::upgrade) {
        return Ok(domain);
    }
    let domain = Domain::allocate(open(name)?).map_err(|failed| failed_on(name, failed))?;
    all.insert(name.to_string(), Arc::downgrade(&domain));
    Ok(domain)
}

fn open(name: &str) -> Result<Context, RdmaError> {
    let library = library()?;
    let failed = |failed| failed_on(name, failed);
    if let Some(context) = library.open_device(name).map_err(failed)? {
        return Ok(context);
    }
    let found = library.device_names().map_err(failed)?;
    if found.is_empty() {
        let because = "there is no RDMA device".to_string();
        return Err(RdmaError::Unavailable { because, advice: WHERE_DEVICES_COME_FROM });
    }
    Err(RdmaError::NoDevice { device: name.to_string(), found })
}

fn read_port(name: &str, context: &Context) -> Result<Port, RdmaError> {
    let attributes = context.port().map_err(|failed| failed_on(name, failed))?;
    let (device, interface) = (name.to_string(), interface_of(name));
    if attributes.state != PORT_ACTIVE {
        return Err(RdmaError::PortDown { device, interface, state: attributes.state });
    }
    let (gid_index, gid) =
        find_address(name, context, attributes.gid_tbl_len).ok_or(RdmaError::NoAddress { device, interface })?;
    let mtu = mtu_bytes(attributes.active_mtu.clamp(1, MTU_4096));
    Ok(Port { lid: attributes.lid, gid, gid_index, mtu, message_bytes: attributes.max_msg_sz })
}

/// The entry of the address table that is an IPv4 address: the only kind that Thunderbolt connects
/// by. Devices that speak both versions of RoCE have it twice; the second version is the one that
/// all speak.
fn find_address(device: &str, context: &Context, entries: i32) -> Option<(u8, Ipv6Addr)> {
    let mut first_version = None;
    for index in 0..entries.min(256) {
        let Some(gid) = context.gid(index).map(Ipv6Addr::from).filter(|gid| gid.to_ipv4_mapped().is_some()) else {
            continue;
        };
        let found = (index as u8, gid);
        match std::fs::read_to_string(linux_port(device).join(format!("gid_attrs/types/{index}"))) {
            Ok(version) if version.contains("v1") => first_version = first_version.or(Some(found)),
            _ => return Some(found),
        }
    }
    first_version
}

/// The network interface behind a device, for messages.
fn interface_of(device: &str) -> String {
    if let Some(interface) = device.strip_prefix("rdma_").filter(|_| cfg!(target_os = "macos")) {
        return format!("the interface {interface}");
    }
    match std::fs::read_to_string(linux_port(device).join("gid_attrs/ndevs/0")) {
        Ok(interface) if !interface.trim().is_empty() => format!("the interface {}", interface.trim()),
        _ => "its network interface".into(),
    }
}

/// The file in which Linux describes the port of a device.
fn linux_port(device: &str) -> PathBuf {
    PathBuf::from(format!("/sys/class/infiniband/{device}/ports/1"))
}

/// `enum ibv_mtu` in bytes.
fn mtu_bytes(number: u32) -> usize {
    128 << number
}

/// Bytes as `enum ibv_mtu`.
pub(crate) fn mtu_number(bytes: usize) -> u32 {
    bytes.ilog2() - 7
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;
    use crate::library::LIBRARY_VARIABLE;

    #[test]
    fn limits_are_refused_with_what_to_do() {
        let none = Held::default();
        let fine = Demand { queue_pairs: 10, memory_bytes: 1 << 20, message_bytes: 4095 * 4096, frames: 1008 };
        let check = |demand: Demand, held| demand.check("rdma_en5", &Limits::apple(), held);
        assert_eq!(check(fine, none), Ok(()));
        let refused = [
            check(Demand { queue_pairs: 12, ..fine }, none),
            check(Demand { queue_pairs: 2, ..fine }, Held { queue_pairs: 10, memory_regions: 3 }),
            check(fine, Held { queue_pairs: 0, memory_regions: 100 }),
            check(Demand { message_bytes: 16 << 20, ..fine }, none),
            check(Demand { frames: 1009, ..fine }, none),
            check(Demand { memory_bytes: (1 << 30) + 1, ..fine }, none),
        ];
        let text: String = refused.into_iter().map(|refused| format!("{}\n", refused.expect_err("too much"))).collect();
        expect![[r#"
            rdma_en5: 12 queue pairs (two for each wire) are asked for, but the limit is 10; use fewer wires on this device, or a ring, which needs wires to two neighbours only
            rdma_en5: 12 queue pairs (two for each wire) are asked for, but the limit is 10; use fewer wires on this device, or a ring, which needs wires to two neighbours only
            rdma_en5: 101 memory regions (one for each group) are asked for, but the limit is 100; leave other groups of this process first
            rdma_en5: 16777216 bytes in one message are asked for, but the limit is 16773120; use smaller bulk slots
            rdma_en5: 1009 frames of 4 KiB in one queue are asked for, but the limit is 1008; use fewer or smaller slots
            rdma_en5: 1073741825 bytes of registered memory are asked for, but the limit is 1073741824; use fewer or smaller slots, or fewer wires on this device
        "#]].assert_eq(&text);
    }

    #[test]
    fn a_share_of_the_limits_comes_back() {
        let demand = Demand { queue_pairs: 6, memory_bytes: 1, message_bytes: 1, frames: 1 };
        let first = Share::take("a device of this test", &Limits::apple(), &demand).expect("6 of 10");
        assert!(Share::take("a device of this test", &Limits::apple(), &demand).is_err(), "12 of 10");
        drop(first);
        assert!(Share::take("a device of this test", &Limits::apple(), &demand).is_ok(), "6 of 10 again");
    }

    #[test]
    fn mtus_are_powers_of_two() {
        for (number, bytes) in [(1, 256), (2, 512), (3, 1024), (4, 2048), (5, 4096)] {
            assert_eq!((mtu_bytes(number), mtu_number(bytes)), (bytes, number));
        }
    }

    /// The library is opened once per process, so a process of its own has to miss it: this test
    /// runs itself again.
    #[test]
    fn a_missing_library_is_an_error_that_says_what_to_do() {
        if std::env::var_os("FINETUNE_TEST_PRINT_DEVICES").is_some() {
            println!("<<{}>>", rdma_devices().expect_err("no such library"));
            return;
        }
        let other_library = if cfg!(target_os = "macos") { "/usr/lib/libSystem.B.dylib" } else { "libc.so.6" };
        for (path, cause) in [("/nonexistent/verbs", "/nonexistent/verbs"), (other_library, "ibv_get_device_list")] {
            let output = std::process::Command::new(std::env::current_exe().expect("this program"))
                .args(["--exact", "device::tests::a_missing_library_is_an_error_that_says_what_to_do", "--nocapture"])
                .env(LIBRARY_VARIABLE, path)
                .env("FINETUNE_TEST_PRINT_DEVICES", "1")
                .output()
                .expect("this program runs");
            let output = String::from_utf8_lossy(&output.stdout).into_owned();
            let message = output.split("<<").nth(1).and_then(|rest| rest.split(">>").next()).expect("a message");
            println!("{message}");
            let begin = "RDMA is not available here, because the verbs library does not load: ";
            assert!(message.starts_with(begin) && message.contains(cause), "{message}");
            assert!(
                message.ends_with("FINETUNE_VERBS_LIB names the library: unset it to use the system's, or use `tcp`")
            );
        }
    }
}

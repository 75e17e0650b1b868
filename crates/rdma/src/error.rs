//! What can go wrong before the first message, each with what to do about it.

use std::io;

use thiserror::Error;

/// Why RDMA cannot be used, or not like this.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RdmaError {
    /// No verbs library, no kernel that knows of RDMA, or no device.
    #[error("RDMA is not available here, because {because}; {advice}")]
    Unavailable {
        /// What is missing.
        because: String,
        /// What to do.
        advice: &'static str,
    },
    /// There are devices, but none of that name.
    #[error("there is no RDMA device {device} here; name one of these: {}", found.join(", "))]
    NoDevice {
        /// The name.
        device: String,
        /// The devices that there are.
        found: Vec<String>,
    },
    /// A call of the verbs library failed.
    #[error("{device}: {call} failed: {}{}", os_text(*errno), advice.map(|advice| format!("; {advice}")).unwrap_or_default())]
    Call {
        /// The device.
        device: String,
        /// The function.
        call: &'static str,
        /// The system's number for the failure.
        errno: i32,
        /// What to do, if that is known.
        advice: Option<&'static str>,
    },
    /// The port carries nothing.
    #[error(
        "the port of {device} is not active (state {state}): is its cable plugged in, and {interface} up at both ends?"
    )]
    PortDown {
        /// The device.
        device: String,
        /// Its network interface.
        interface: String,
        /// The state that the driver reports.
        state: u32,
    },
    /// The port has no IPv4-mapped address.
    #[error("{device} has no IPv4 address: give {interface} one, at both ends of the cable and in the same network")]
    NoAddress {
        /// The device.
        device: String,
        /// Its network interface.
        interface: String,
    },
    /// More is asked of a device than it may give.
    #[error("{device}: {wanted} {what} are asked for, but the limit is {limit}; {advice}")]
    Limit {
        /// The device.
        device: String,
        /// What is limited.
        what: &'static str,
        /// How much is asked for.
        wanted: u64,
        /// How much there may be.
        limit: u64,
        /// What to do.
        advice: &'static str,
    },
    /// An option that no device can follow.
    #[error("RDMA cannot be used with {what}")]
    Option {
        /// The option and what it may be.
        what: String,
    },
    /// Two ranks do not fit together.
    #[error("rank {rank} and rank {peer} cannot be connected over RDMA: {what}")]
    Disagreement {
        /// This rank.
        rank: usize,
        /// The other one.
        peer: usize,
        /// What they disagree about, and what to do.
        what: String,
    },
}

impl RdmaError {
    /// The same with other numbers of the ranks: `ranks[n]` is what people call rank n.
    ///
    /// # Panics
    /// If it names a rank that has no other number.
    pub fn with_ranks(self, ranks: &[usize]) -> RdmaError {
        match self {
            RdmaError::Disagreement { rank, peer, what } => {
                RdmaError::Disagreement { rank: ranks[rank], peer: ranks[peer], what }
            }
            other => other,
        }
    }

    pub(crate) fn call(device: &str, call: &'static str, errno: i32) -> RdmaError {
        RdmaError::Call { device: device.to_string(), call, errno, advice: advice(call, errno) }
    }
}

/// The system's message for an error number.
pub(crate) fn os_text(errno: i32) -> String {
    io::Error::from_raw_os_error(errno).to_string()
}

/// What to do about a failed call, as far as causes are known.
fn advice(call: &str, errno: i32) -> Option<&'static str> {
    match (call, errno) {
        (_, libc::EACCES | libc::EPERM) if cfg!(target_os = "linux") => {
            Some("this user may not open /dev/infiniband/uverbs*: add it to the group that owns them")
        }
        ("ibv_reg_mr", libc::ENOMEM) if cfg!(target_os = "linux") => {
            Some("raise the limit of locked memory (ulimit -l)")
        }
        ("ibv_reg_mr" | "ibv_alloc_pd", _) => Some(
            "the device may be out of memory regions: end other programs that use it; on macOS, what a crashed \
             program held comes back after a restart",
        ),
        ("ibv_create_qp", libc::EBUSY) => Some(
            "the device is out of queue pairs (Thunderbolt has 10, for all programs together): end other programs that \
             use it",
        ),
        ("ibv_create_qp", libc::EOPNOTSUPP | libc::ENOSYS) => {
            Some("the device has no queue pairs of this kind; try the other one of `uc` and `rc`")
        }
        ("ibv_create_qp", libc::ENOMEM | libc::EINVAL) => Some("fewer or smaller slots may fit the device"),
        ("ibv_modify_qp to RTR", _) => Some(
            "are both interfaces in the same network, and does `ping` reach the peer? After a crash it can help to take \
             the interface down, wait 15 seconds and bring it up again",
        ),
        ("ibv_post_recv", libc::ENOMEM) => {
            Some("the queue is shallower than the driver said: use fewer or smaller slots")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn every_message_names_the_device_and_what_to_do() {
        let interface = "the interface en5".to_string();
        let device = "rdma_en5".to_string();
        let errors = [
            RdmaError::NoAddress { device: device.clone(), interface: interface.clone() },
            RdmaError::PortDown { device: device.clone(), interface, state: 1 },
            RdmaError::call(&device, "ibv_create_qp", libc::EBUSY),
            RdmaError::call(&device, "ibv_query_port", libc::EIO),
            RdmaError::NoDevice { device, found: vec!["rdma_en3".into(), "rdma_en4".into()] },
            RdmaError::Unavailable { because: "there is no RDMA device".into(), advice: "use `tcp`" },
        ];
        let text: String = errors.iter().map(|error| format!("{error}\n")).collect();
        // The number of an error differs between systems.
        let text = text.replace(&format!("{})", libc::EBUSY), "N)").replace(&format!("{})", libc::EIO), "N)");
        expect![[r#"
            rdma_en5 has no IPv4 address: give the interface en5 one, at both ends of the cable and in the same network
            the port of rdma_en5 is not active (state 1): is its cable plugged in, and the interface en5 up at both ends?
            rdma_en5: ibv_create_qp failed: Device or resource busy (os error N); the device is out of queue pairs (Thunderbolt has 10, for all programs together): end other programs that use it
            rdma_en5: ibv_query_port failed: Input/output error (os error N)
            there is no RDMA device rdma_en5 here; name one of these: rdma_en3, rdma_en4
            RDMA is not available here, because there is no RDMA device; use `tcp`
        "#]]
        .assert_eq(&text);
    }
}

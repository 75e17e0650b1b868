//! How to join a group.

use std::net::IpAddr;
use std::time::Duration;

use crate::devices::DeviceMatrix;
use crate::frame::Algorithm;
use crate::join_error::JoinError;
use crate::notice::{Notices, no_notices};
use crate::random_bytes::hex;
use crate::secret::Secret;
use crate::transport::tcp::TcpOptions;

/// What carries the data, as asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackendChoice {
    /// RDMA where it is cabled and works, TCP otherwise.
    #[default]
    Auto,
    /// TCP.
    Tcp,
    /// RDMA, or an error.
    Rdma,
}

/// How to join a group of separate processes.
#[derive(Clone)]
pub struct Config {
    /// This process's rank, below `world`.
    pub rank: usize,
    /// The number of ranks.
    pub world: usize,
    /// `host:port` where rank 0 takes connections.
    pub rendezvous: String,
    /// The run's name: ranks of another run are turned away.
    pub run: String,
    /// The token that all ranks share.
    pub secret: Secret,
    /// What all ranks must agree on before they start: a name ("recipe", "program") and a digest
    /// each.
    pub claims: Vec<(String, [u8; 32])>,
    /// What messages call this rank's machine.
    pub host: String,
    /// What carries the data.
    pub backend: BackendChoice,
    /// Always this way, rather than the one that suits each message.
    pub topology: Option<Algorithm>,
    /// A silent rank is lost after this.
    pub timeout: Duration,
    /// How long ranks wait for each other at the start.
    pub join_timeout: Duration,
    /// Ranks listen at all addresses of their machines, whatever address the others call them by.
    /// Without it rank 0 listens at the rendezvous alone. The token guards the door either way;
    /// without a token this is ignored.
    pub everywhere: bool,
    /// Ports at which ranks above 0 listen, first and last: the first free one. None: any.
    pub ports: Option<(u16, u16)>,
    /// Addresses of this rank's machine at which others may reach it, the likeliest first. Those of
    /// its network interfaces need not be among them.
    pub addresses: Vec<IpAddr>,
    /// Who started this rank, for messages: "srun", "RANK and WORLD_SIZE". May be empty.
    pub started_by: String,
    /// Longest time without any progress in an operation while every rank is alive.
    pub operation_timeout: Duration,
    /// How TCP connections are used.
    pub tcp: TcpOptions,
    /// Where RDMA devices are, and how they are used.
    pub rdma: RdmaOptions,
    /// Who is told what happens.
    pub notices: Notices,
}

/// How RDMA is used.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RdmaOptions {
    /// Which devices join which ranks: for each other rank the names of this rank's devices, one
    /// per cable. Every rank passes the same matrix.
    pub devices: Option<DeviceMatrix>,
    /// Reliable connections instead of unreliable ones (not on Apple's devices).
    pub reliable: bool,
    /// Apple's limits, also on other devices.
    pub strict: bool,
}

impl Config {
    /// A configuration with the usual settings.
    pub fn new(rank: usize, world: usize, rendezvous: impl Into<String>, secret: Secret) -> Config {
        Config {
            rank,
            world,
            rendezvous: rendezvous.into(),
            run: String::new(),
            secret,
            claims: Vec::new(),
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            backend: BackendChoice::Auto,
            topology: None,
            timeout: Duration::from_secs(5),
            join_timeout: Duration::from_secs(60),
            everywhere: false,
            ports: None,
            addresses: Vec::new(),
            started_by: String::new(),
            operation_timeout: Duration::from_secs(600),
            tcp: TcpOptions::default(),
            rdma: RdmaOptions::default(),
            notices: no_notices(),
        }
    }

    /// Adds something that all ranks must agree on; messages call it `name`, ranks compare a digest
    /// of `content`.
    pub fn claim(&mut self, name: &str, content: &[u8]) {
        self.claims.push((name.into(), *blake3::hash(content).as_bytes()));
    }

    /// The claims, and the settings that ranks must share.
    pub(crate) fn claims_as_text(&self) -> Vec<(String, String)> {
        let ours = self.claims.iter().map(|(name, digest)| (name.clone(), hex(digest)));
        ours.chain([("settings of the group".to_owned(), hex(blake3::hash(self.shared().as_bytes()).as_bytes()))])
            .collect()
    }

    /// What must be the same on all ranks for their plans to fit together.
    fn shared(&self) -> String {
        let Config {
            backend,
            topology,
            timeout,
            tcp: TcpOptions { streams, frame_bytes, shared_memory, .. },
            rdma,
            ..
        } = self;
        let RdmaOptions { devices, reliable, strict } = rdma;
        let devices = devices.as_ref().map(DeviceMatrix::to_json);
        format!(
            "{backend:?} {topology:?} {timeout:?} {streams} {frame_bytes} {shared_memory} {devices:?} {reliable} {strict}"
        )
    }

    /// Whether this rank listens at all addresses of its machine.
    pub(crate) fn listens_everywhere(&self) -> bool {
        self.everywhere && !self.secret.is_loopback_only()
    }

    pub(crate) fn check(&self) -> Result<(), JoinError> {
        let refuse = |why: String| Err(JoinError::Config(why));
        if self.world == 0 || self.rank >= self.world {
            return refuse(format!("rank {} is not below the number of ranks, {}", self.rank, self.world));
        }
        if self.world > usize::from(u16::MAX) {
            return refuse(format!("{} ranks are more than a group can have", self.world));
        }
        if self.timeout < Duration::from_millis(500) {
            return refuse(format!(
                "a timeout of {:?} is too short to tell a slow rank from a lost one; use 1s or more",
                self.timeout
            ));
        }
        Ok(())
    }
}

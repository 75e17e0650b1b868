//! How a server behaves, and its bounds.

use std::path::PathBuf;
use std::time::Duration;

/// How a server behaves.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The name or address to listen at.
    pub host: String,
    /// 0: a free one.
    pub port: u16,
    /// What clients of `/v1` have to send as `Authorization: Bearer KEY`.
    pub key: Option<String>,
    /// The most tokens of an answer whose request does not say.
    pub max_tokens: usize,
    /// How long running answers may go on once the server is asked to stop.
    pub grace: Duration,
    /// Adapters below it may be loaded while the server runs.
    pub adapters_dir: Option<PathBuf>,
    /// Bounds on connections.
    pub bounds: Bounds,
}

/// Bounds on connections.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// The most connections at a time. More wait until one ends.
    pub connections: usize,
    /// From the connection, or the answer before, to the last byte of a request.
    pub request: Duration,
    /// How long a client may take nothing of its answer.
    pub stall: Duration,
    /// How long a request may wait for its turn.
    pub turn: Duration,
    /// The most bytes of a request's body.
    pub body: usize,
    /// The most bytes of all bodies whose requests are under way.
    pub bodies: usize,
}

impl Default for Bounds {
    fn default() -> Bounds {
        let [request, stall, turn] = [30, 30, 600].map(Duration::from_secs);
        Bounds { connections: 512, request, stall, turn, body: 16 << 20, bodies: 128 << 20 }
    }
}

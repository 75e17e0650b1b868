//! The rules of the control connections, without threads, clocks and sockets.
//!
//! [`ControlDriver::poll`] takes the time and what has come in, and returns what to do.
//! `control.rs` calls it with sockets and a clock, the simulation with its own network and time.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::group_status::GroupStatus;
use crate::sealed::Seals;
use crate::session::{Action, Event, Message, Session, Warning};
use crate::verdict::{Cause, Verdict};

/// What came in since the last turn.
#[derive(Default)]
pub(crate) struct Inbox {
    pub(crate) arrived: Vec<Arrived>,
    /// Why this rank stops, if it reported something.
    pub(crate) reports: Vec<Cause>,
    /// This rank leaves the group; this turn is its last.
    pub(crate) leaving: bool,
    /// Peers that read too slowly: they get no heartbeats in this turn.
    pub(crate) congested: Vec<usize>,
}

/// What came in on one connection.
pub(crate) struct Arrived {
    pub(crate) from: usize,
    pub(crate) bytes: Vec<u8>,
    /// The peer closed the connection after these bytes.
    pub(crate) ended: bool,
}

/// What the owner of the sockets has to do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// One sealed message.
    Send { to: usize, bytes: Vec<u8> },
    /// The peer closed its connection. Nothing more is read from it or sent on it.
    Ended { peer: usize },
    /// A message did not open, so nothing after it can be believed. The connection is closed at
    /// this end: the peer sees that at once and need not wait for the silence.
    Distrusted { peer: usize },
    /// Something to tell the user.
    Warn(Warning),
    /// The group has failed.
    End(Verdict),
}

struct Connection {
    seals: Seals,
    open: bool,
}

/// One rank's end of all control connections, and its session.
pub(crate) struct ControlDriver {
    session: Session,
    connections: BTreeMap<usize, Connection>,
    status: Arc<GroupStatus>,
}

impl ControlDriver {
    /// `seals`: one pair for each peer.
    pub(crate) fn new(session: Session, seals: BTreeMap<usize, Seals>, status: Arc<GroupStatus>) -> ControlDriver {
        let connections = seals.into_iter().map(|(peer, seals)| (peer, Connection { seals, open: true })).collect();
        ControlDriver { session, connections, status }
    }

    /// When the next turn is due at the latest.
    pub(crate) fn next_poll(&self) -> Duration {
        self.session.next_tick()
    }

    /// Whether more may come from `peer`.
    #[cfg(test)]
    pub(crate) fn is_open(&self, peer: usize) -> bool {
        self.connections.get(&peer).is_some_and(|connection| connection.open)
    }

    /// One turn. What has arrived is read before time is judged: a rank that was stopped must not
    /// accuse the others.
    pub(crate) fn poll(&mut self, now: Duration, inbox: Inbox) -> Vec<Effect> {
        let mut turn = Turn { now, congested: inbox.congested, effects: Vec::new() };
        self.session.set_progress(self.status.progress());
        for arrived in inbox.arrived {
            self.on_bytes(arrived, &mut turn);
        }
        for cause in inbox.reports {
            self.apply(Event::Report(cause), &mut turn);
        }
        if inbox.leaving {
            self.apply(Event::Leave, &mut turn);
        }
        self.apply(Event::Tick, &mut turn);
        turn.effects
    }

    fn on_bytes(&mut self, arrived: Arrived, turn: &mut Turn) {
        let Arrived { from, bytes, ended } = arrived;
        let Some(connection) = self.connections.get_mut(&from).filter(|connection| connection.open) else { return };
        let opened = connection.seals.open::<Message>(&bytes, ended);
        connection.open = matches!(opened, Ok(Some(_)));
        match opened {
            Ok(Some(messages)) => {
                for message in messages {
                    self.status.on_message(turn.now, from, &message);
                    self.apply(Event::Received { from, message }, turn);
                }
                return;
            }
            Ok(None) => turn.effects.push(Effect::Ended { peer: from }),
            Err(_) => turn.effects.push(Effect::Distrusted { peer: from }),
        }
        self.apply(Event::Closed { from }, turn);
    }

    /// Tells the session and turns its actions into effects.
    fn apply(&mut self, event: Event, turn: &mut Turn) {
        for action in self.session.on(turn.now, event) {
            match action {
                Action::Send { to, message } => {
                    let skipped = matches!(message, Message::Heartbeat(_)) && turn.congested.contains(&to);
                    if let Some(connection) = self.connections.get_mut(&to)
                        && connection.open
                        && !skipped
                    {
                        turn.effects.push(Effect::Send { to, bytes: connection.seals.seal(&message) });
                    }
                }
                Action::Warn(warning) => turn.effects.push(Effect::Warn(warning)),
                Action::End(verdict) => turn.effects.push(Effect::End(verdict)),
            }
        }
    }
}

/// What one call of [`ControlDriver::poll`] carries along.
struct Turn {
    now: Duration,
    congested: Vec<usize>,
    effects: Vec<Effect>,
}

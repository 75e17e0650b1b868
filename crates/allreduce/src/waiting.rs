//! What a rank says while it waits for others.

use std::time::{Duration, Instant};

use crate::config::Config;
use crate::notice::Notice;

/// How long a rank waits before it first says so.
const FIRST_NOTICE: Duration = Duration::from_secs(2);

/// Time between two such notices.
const NOTICE_INTERVAL: Duration = Duration::from_secs(10);

/// Says at intervals for whom a rank waits.
pub(crate) struct WaitNotices<'a> {
    config: &'a Config,
    deadline: Instant,
    next: Instant,
}

impl WaitNotices<'_> {
    pub(crate) fn new(config: &Config, deadline: Instant) -> WaitNotices<'_> {
        WaitNotices { config, deadline, next: Instant::now() + FIRST_NOTICE }
    }

    pub(crate) fn say(&mut self, what: impl FnOnce() -> String) {
        if Instant::now() < self.next {
            return;
        }
        self.next = Instant::now() + NOTICE_INTERVAL;
        let Config { rank, world, started_by, notices, .. } = self.config;
        let left = self.deadline.saturating_duration_since(Instant::now());
        notices(Notice::Waiting { rank: *rank, world: *world, started_by: started_by.clone(), what: what(), left });
    }
}

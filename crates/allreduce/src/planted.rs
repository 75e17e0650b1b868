//! Bugs planted on purpose, to test the tests: the simulator has to catch each one.
//!
//! Outside this crate's own tests [`planted`] is a constant `false` and the compiler removes it.

/// A mistake that somebody could make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bug {
    /// A payload with a wrong checksum is used.
    ChecksumNotChecked,
    /// A frame after a gap is used.
    SequenceNotChecked,
    /// A frame of an earlier group is used.
    StaleSessionAccepted,
    /// A frame of another operation is used.
    DivergenceNotChecked,
    /// Peers are summed as they arrive.
    ArrivalOrderSum,
    /// The last element of each segment is left out.
    ChunkOffByOne,
    /// A segment is handed on before its sum is complete.
    SentBeforeReduced,
    /// A rank that gives up does not tell the others.
    AbortNotForwarded,
    /// Heartbeats stop while an operation runs.
    HeartbeatFromBlockedThread,
    /// Silence is never judged.
    SilenceIgnored,
    /// A control message is believed whatever its seal says.
    SealNotChecked,
    /// A rank that was frozen itself accuses the others.
    OwnFreezeNotNoticed,
    /// All messages of a control connection are sealed with the same count, so that one can be replayed.
    SealCountKept,
    /// Each rank judges for itself, by the records that happened to reach it.
    JudgedAlone,
}

#[cfg(test)]
std::thread_local! {
    static PLANTED: std::cell::Cell<Option<Bug>> = const { std::cell::Cell::new(None) };
}

/// Whether `bug` is planted in this thread.
#[cfg(test)]
#[inline]
pub(crate) fn planted(bug: Bug) -> bool {
    PLANTED.with(|planted| planted.get() == Some(bug))
}

/// Whether `bug` is planted: never, outside the tests.
#[cfg(not(test))]
#[inline(always)]
pub(crate) fn planted(_: Bug) -> bool {
    false
}

/// Runs `work` with `bug` planted in this thread.
#[cfg(test)]
pub(crate) fn with_planted<T>(bug: Option<Bug>, work: impl FnOnce() -> T) -> T {
    PLANTED.with(|planted| planted.set(bug));
    let result = work();
    PLANTED.with(|planted| planted.set(None));
    result
}

//! Bugs planted on purpose, to test the tests: the simulation has to catch each one.
//!
//! A [`Mutations`] value belongs to the session, the seals or the links under test. Only tests can
//! make one that holds a bug. In any other build the type has no bytes, [`Mutations::has`] is a
//! constant `false` and the compiler removes it.

/// A mistake in the code under test.
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
    #[cfg(test)]
    ArrivalOrderSum,
    /// The last element of each run of frames is left out.
    #[cfg(test)]
    ChunkOffByOne,
    /// A segment is handed on before its sum is complete.
    #[cfg(test)]
    SentBeforeReduced,
    /// A rank that gives up does not tell the others.
    AbortNotForwarded,
    /// Heartbeats stop while an operation runs.
    HeartbeatFromBlockedThread,
    /// Silence is never judged.
    SilenceIgnored,
    /// A control message with a wrong seal is believed.
    SealNotChecked,
    /// A rank that was frozen itself accuses the others.
    OwnFreezeNotNoticed,
    /// All messages of a control connection are sealed with the same count, so one can be replayed.
    SealCountKept,
    /// Each rank judges for itself, by the records that happened to reach it.
    JudgedAlone,
}

/// What is wrong with the code under test. The default: nothing.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Mutations {
    #[cfg(test)]
    planted: Option<Bug>,
}

impl Mutations {
    /// Code with `bug`, or without any.
    #[cfg(test)]
    pub(crate) fn with(bug: Option<Bug>) -> Mutations {
        Mutations { planted: bug }
    }

    /// Whether `bug` is planted.
    #[cfg(test)]
    #[inline]
    pub(crate) fn has(self, bug: Bug) -> bool {
        self.planted == Some(bug)
    }

    /// Whether a bug is planted: never, outside the tests.
    #[cfg(not(test))]
    #[inline(always)]
    pub(crate) fn has(self, _: Bug) -> bool {
        false
    }
}

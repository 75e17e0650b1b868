//! The points of a run at which the tests kill it. Each is passed several times in a run.

/// Points that every rank passes in each step, in the order of the code.
pub(crate) const OF_EVERY_RANK: &[&str] = &["train.step", "train.reduce", "train.updated", "train.evaluated"];

/// Points that a rank passes for each micro-batch and layer, where several hold the layers together.
pub(crate) const OF_EVERY_STAGE: &[&str] = &["hops.send", "hops.receive"];

/// The point before each connection from a rank that holds layers to another one is made.
pub(crate) const OF_EVERY_CONNECTION: &str = "stages.connect";

/// The point before each piece of values and moments that a rank with other layers sends to rank 0 for a checkpoint.
pub(crate) const OF_EVERY_PIECE: &str = "moments.send";

/// The point before each tensor of a checkpoint or result, on rank 0. There are hundreds of them in a run.
pub(crate) const OF_EVERY_TENSOR: &str = "checkpoint.tensor";

/// The point before each layer that is read from the disk.
pub(crate) const OF_EVERY_READ: &str = "layers.read";

/// The point before each part of a file of weights that is read. Loading passes it some dozen times, each step some
/// dozen more if layers are read from the disk.
pub(crate) const OF_EVERY_PART: &str = "file.read";

/// The point in the middle of an average of steps that ranks made alone.
pub(crate) const OF_EVERY_MEETING: &str = "local.meet";

/// Points that only rank 0 passes, because no other rank writes.
pub(crate) const OF_RANK_0: &[&str] = &[
    "metrics.append",
    "checkpoint.begin",
    "checkpoint.file",
    "checkpoint.written",
    "checkpoint.synced",
    "checkpoint.renamed",
    "checkpoint.done",
    "prune.trashed",
    "train.publish",
    "train.published",
];

/// The point at which an older result has made way. Only a finished run that is run again passes
/// it.
pub(crate) const REPLACING: &str = "replace.aside";

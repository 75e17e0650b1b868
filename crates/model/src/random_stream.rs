//! What random numbers are drawn for.

/// Each purpose has streams of its own. The numbers are part of every run's bits.
#[derive(Clone, Copy)]
pub(crate) enum RandomStream {
    Weights = 1,
    Adapter = 2,
    Dropout = 3,
    Sampling = 4,
}

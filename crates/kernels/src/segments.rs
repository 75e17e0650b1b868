//! The rows of a micro-batch: where each begins and ends in the flat list of tokens.

use std::ops::Range;
use std::sync::Arc;

use crate::on_device::OnDevice;

/// One row: the range of its queries, and the range of the keys that they may see. Both in tokens.
///
/// Without a cache both ranges are the same tokens. With a key/value cache there are more keys than
/// queries, and the last query belongs to the last key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The first query.
    pub query_start: usize,
    /// The number of queries.
    pub queries: usize,
    /// The first key.
    pub key_start: usize,
    /// The number of keys, at least that of the queries.
    pub keys: usize,
}

/// The rows of a micro-batch, laid one after the other without padding. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Segments(Arc<[Segment]>, #[cfg_attr(not(gpu_backend), expect(dead_code, reason = "GPUs only"))] OnDevice);

impl Segments {
    /// Rows of these lengths in tokens, one after the other. Each attends to itself alone.
    pub fn rows(lengths: &[usize]) -> Segments {
        let mut start = 0;
        lengths
            .iter()
            .map(|&length| {
                let segment = Segment { query_start: start, queries: length, key_start: start, keys: length };
                start += length;
                segment
            })
            .collect::<Vec<_>>()
            .into()
    }

    /// One query for each row: the last of the row's keys, which are these. Other keys may lie
    /// between them.
    ///
    /// # Panics
    /// If a range is empty.
    pub fn next_tokens(keys: impl IntoIterator<Item = Range<usize>>) -> Segments {
        let segment = |(row, keys): (usize, Range<usize>)| {
            assert!(!keys.is_empty(), "a query sees its own key");
            Segment { query_start: row, queries: 1, key_start: keys.start, keys: keys.len() }
        };
        keys.into_iter().enumerate().map(segment).collect::<Vec<_>>().into()
    }

    /// The rows in their order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Segment> {
        self.0.iter()
    }

    /// What was made of the rows on a GPU, by sliding window.
    #[cfg(gpu_backend)]
    pub(crate) fn on_device(&self) -> &OnDevice {
        &self.1
    }

    /// The number of rows.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl From<Vec<Segment>> for Segments {
    fn from(segments: Vec<Segment>) -> Segments {
        Segments(segments.into(), OnDevice::default())
    }
}

//! What is here of a matrix or a vector.

use std::ops::Range;

/// Along which dimension a matrix is cut, and what is here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Along {
    /// Some of the outputs, in this order.
    Rows(Vec<Range<usize>>),
    /// Some of the inputs.
    Columns(Range<usize>),
}

/// The part of a matrix that is here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cut {
    /// The shape of all of it.
    pub(crate) whole: [usize; 2],
    pub(crate) along: Along,
}

impl Cut {
    /// The shape of the part.
    pub(crate) fn shape(&self) -> [usize; 2] {
        match &self.along {
            Along::Rows(ranges) => [total(ranges), self.whole[1]],
            Along::Columns(range) => [self.whole[0], range.len()],
        }
    }

    /// The same of a matrix whose elements are so many numbers each: bytes.
    pub(crate) fn wide(&self, each: usize) -> Cut {
        let [rows, columns] = self.whole;
        let along = match &self.along {
            Along::Rows(ranges) => Along::Rows(ranges.clone()),
            Along::Columns(range) => Along::Columns(range.start * each..range.end * each),
        };
        Cut { whole: [rows, columns * each], along }
    }

    /// The part of all elements, row-major.
    pub(crate) fn of<T: Copy>(&self, all: &[T]) -> Vec<T> {
        let columns = self.whole[1];
        match &self.along {
            Along::Rows(ranges) => {
                ranges.iter().flat_map(|range| &all[range.start * columns..range.end * columns]).copied().collect()
            }
            Along::Columns(range) => all.chunks(columns).flat_map(|row| &row[range.clone()]).copied().collect(),
        }
    }
}

/// The part of a vector that is here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum VectorCut {
    /// Some of its elements, in this order.
    Ranges { whole: usize, ranges: Vec<Range<usize>> },
    /// None of it: another process adds it. It is zero here.
    Elsewhere { length: usize },
}

impl VectorCut {
    /// The length of all of it.
    pub(crate) fn whole(&self) -> usize {
        match self {
            VectorCut::Ranges { whole, .. } => *whole,
            VectorCut::Elsewhere { length } => *length,
        }
    }

    /// The length of what is here.
    pub(crate) fn length(&self) -> usize {
        match self {
            VectorCut::Ranges { ranges, .. } => total(ranges),
            VectorCut::Elsewhere { length } => *length,
        }
    }

    /// The part of all elements.
    pub(crate) fn of(&self, all: &[f32]) -> Vec<f32> {
        match self {
            VectorCut::Ranges { ranges, .. } => ranges.iter().flat_map(|range| &all[range.clone()]).copied().collect(),
            VectorCut::Elsewhere { length } => vec![0.0; *length],
        }
    }
}

fn total(ranges: &[Range<usize>]) -> usize {
    ranges.iter().map(Range::len).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_matrix() {
        let all: Vec<u8> = (0..12).collect();
        let cut = |along| Cut { whole: [4, 3], along };
        for (cut, shape, part) in [
            (cut(Along::Rows(vec![1..2, 3..4])), [2, 3], vec![3, 4, 5, 9, 10, 11]),
            (cut(Along::Columns(1..3)), [4, 2], vec![1, 2, 4, 5, 7, 8, 10, 11]),
        ] {
            assert_eq!(cut.shape(), shape);
            assert_eq!(cut.of(&all), part);
        }
    }

    #[test]
    fn parts_of_a_vector() {
        let all = [0.5, 1.5, 2.5, 3.5];
        for (cut, part) in [
            (VectorCut::Ranges { whole: 4, ranges: vec![0..1, 2..4] }, vec![0.5, 2.5, 3.5]),
            (VectorCut::Elsewhere { length: 4 }, vec![0.0; 4]),
        ] {
            assert_eq!((cut.whole(), cut.length()), (4, part.len()));
            assert_eq!(cut.of(&all), part);
        }
    }
}

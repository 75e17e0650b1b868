//! Why a row cannot be used, or why no row can.

use crate::error::DatasetError;
use crate::problem::RowProblem;

pub(crate) enum Failure {
    /// This row cannot be used.
    Row(RowProblem),
    /// There is nothing in the row to train on.
    ZeroLabel(RowProblem),
    /// No row can be used: the next one would fail in the same way.
    All(DatasetError),
}

impl From<RowProblem> for Failure {
    fn from(problem: RowProblem) -> Self {
        Self::Row(problem)
    }
}

impl From<DatasetError> for Failure {
    fn from(error: DatasetError) -> Self {
        match error {
            DatasetError::Template(problem) => Self::Row(RowProblem::Template(problem)),
            DatasetError::Tokenizer { reason } => Self::Row(RowProblem::Tokenizer(reason)),
            // Among them a template that ran out of its bounds.
            other => Self::All(other),
        }
    }
}

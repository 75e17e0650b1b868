//! Why a row cannot be used, or why none can.

use crate::error::DatasetError;
use crate::problem::RowProblem;

pub(crate) enum Failure {
    Row(RowProblem),
    /// There is nothing in the row to train on.
    ZeroLabel(RowProblem),
    /// The next row would end as this one did.
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
            // A template that ran out of its bounds among them.
            other => Self::All(other),
        }
    }
}

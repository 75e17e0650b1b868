//! Why a row cannot be used, or why none can.

use crate::error::DatasetError;
use crate::jsonl::RowProblem;

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
            DatasetError::Template { reason } | DatasetError::Tokenizer { reason } => {
                Self::Row(RowProblem::new(reason))
            }
            // A template that ran out of its bounds among them.
            other => Self::All(other),
        }
    }
}

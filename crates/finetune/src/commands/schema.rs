//! `finetune schema`: the JSON schema of recipes.

use std::process::ExitCode;

use crate::failure::Failure;
use crate::output;

pub(crate) fn schema() -> Result<ExitCode, Failure> {
    output::print(&finetune_recipe::schema::json())?;
    Ok(ExitCode::SUCCESS)
}

//! Arguments of `import`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use finetune_import::Tool;

#[derive(Debug, Args)]
pub(crate) struct ImportArguments {
    /// The YAML file that the other tool is started with
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Whose file it is, if its keys do not tell
    #[arg(long, value_enum, value_name = "TOOL")]
    pub(crate) from: Option<ToolArgument>,
    /// Write the recipe here instead of printing it; nothing is written over
    #[arg(long, short, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ToolArgument {
    Axolotl,
    LlamaFactory,
    Torchtune,
    MlxLm,
}

impl From<ToolArgument> for Tool {
    fn from(tool: ToolArgument) -> Tool {
        match tool {
            ToolArgument::Axolotl => Tool::Axolotl,
            ToolArgument::LlamaFactory => Tool::LlamaFactory,
            ToolArgument::Torchtune => Tool::Torchtune,
            ToolArgument::MlxLm => Tool::MlxLm,
        }
    }
}

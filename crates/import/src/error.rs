//! Why there is no recipe.

use std::path::PathBuf;

use finetune_advice::Advice;

use crate::Tool;

/// Why a configuration was not imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The text is longer than a configuration can be.
    #[error("{}: {bytes} bytes are too long for a configuration (the limit is {limit})", file.display())]
    TooLong {
        /// The configuration.
        file: PathBuf,
        /// Its length.
        bytes: usize,
        /// The longest that is read.
        limit: usize,
    },
    /// The text is not YAML.
    #[error("{}:{line}:{column}: not YAML: {message}", file.display())]
    NoYaml {
        /// The configuration.
        file: PathBuf,
        /// From 1.
        line: usize,
        /// From 1.
        column: usize,
        /// What the parser found.
        message: String,
    },
    /// No tool is known by these keys.
    #[error(
        "{}: not a configuration of axolotl, LLaMA-Factory, torchtune or mlx-lm: {found}",
        file.display()
    )]
    Unknown {
        /// The configuration.
        file: PathBuf,
        /// What there is instead.
        found: String,
    },
    /// Keys of several tools.
    #[error("{}: keys of {} stand in it", file.display(), names(tools))]
    Ambiguous {
        /// The configuration.
        file: PathBuf,
        /// The tools whose keys there are.
        tools: Vec<Tool>,
    },
    /// The file belongs to a tool and describes something else than training.
    #[error("{}: {tool}'s, but it does not describe a training: {what}", file.display())]
    NoTraining {
        /// The configuration.
        file: PathBuf,
        /// Whose it is.
        tool: Tool,
        /// What it lacks.
        what: String,
    },
    /// The recipe that was written is not one: a fault of this program.
    #[error("{}: the recipe that came out is refused: {problem}", file.display())]
    Refused {
        /// The configuration.
        file: PathBuf,
        /// What the recipe's reader says.
        problem: String,
    },
}

fn names(tools: &[Tool]) -> String {
    let names: Vec<&str> = tools.iter().map(|tool| tool.name()).collect();
    names.join(" and ")
}

impl Advice for ImportError {
    fn hints(&self) -> Vec<String> {
        match self {
            ImportError::Ambiguous { tools, .. } => {
                let flags: Vec<&str> = tools.iter().map(|tool| tool.flag()).collect();
                vec![format!("say whose it is: --from {}", flags.join(" or --from "))]
            }
            ImportError::Unknown { .. } => vec![
                "if it is one all the same, say whose: --from axolotl, llama-factory, torchtune or mlx-lm".to_owned(),
                "`finetune init` writes a recipe to begin with".to_owned(),
            ],
            ImportError::NoTraining { .. } => {
                vec!["name the file that the tool is started with to train".to_owned()]
            }
            ImportError::Refused { .. } => vec!["please report it, with the file".to_owned()],
            ImportError::TooLong { .. } | ImportError::NoYaml { .. } => Vec::new(),
        }
    }
}

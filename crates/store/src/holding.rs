//! The kinds of things that can lie at a path.

use std::path::Path;

/// What a path holds, by names and first bytes. Follows links; never reads more than a few KiB of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holding {
    Missing,
    ModelDirectory,
    /// PEFT's or mlx-lm's.
    Adapter,
    Run,
    Checkpoint,
    Directory,
    EmptyDirectory,
    EmptyFile,
    /// A TOML file.
    Recipe,
    Yaml,
    Gguf,
    LfsPointer,
    Html,
    Gzip,
    Zstd,
    Zip,
    Parquet,
    Arrow,
    Csv,
    Tsv,
    JsonArray,
    JsonObject,
    JsonLines,
    Utf16,
    /// torch's own format: `.bin`, `.pt`, `.pth`.
    Pickle,
    Safetensors,
    /// A tokenizer.model.
    SentencePiece,
    Jinja,
    Text,
    Binary,
}

impl Holding {
    /// With its article, as in "x is a Parquet file".
    pub fn describe(self) -> &'static str {
        match self {
            Holding::Missing => "not there",
            Holding::ModelDirectory => "a model directory",
            Holding::Adapter => "an adapter",
            Holding::Run => "a run of finetune",
            Holding::Checkpoint => "a checkpoint of a run",
            Holding::Directory => "a directory",
            Holding::EmptyDirectory => "an empty directory",
            Holding::EmptyFile => "an empty file",
            Holding::Recipe => "a TOML file, such as a recipe",
            Holding::Yaml => "a YAML file, such as another program's recipe",
            Holding::Gguf => "a GGUF model, llama.cpp's format",
            Holding::LfsPointer => "a git-lfs pointer in place of the file",
            Holding::Html => "a web page in place of the file",
            Holding::Gzip => "a gzip file",
            Holding::Zstd => "a zstd file",
            Holding::Zip => "a zip file",
            Holding::Parquet => "a Parquet file",
            Holding::Arrow => "an Arrow file",
            Holding::Csv => "a CSV file",
            Holding::Tsv => "a table with tabs (TSV)",
            Holding::JsonArray => "a JSON file with one list",
            Holding::JsonObject => "a JSON file with one object",
            Holding::JsonLines => "a file of rows, one JSON object a line",
            Holding::Utf16 => "a UTF-16 text file",
            Holding::Pickle => "a pickle, torch's own format, which can run code when it is read",
            Holding::Safetensors => "a safetensors file",
            Holding::SentencePiece => "a SentencePiece tokenizer (tokenizer.model)",
            Holding::Jinja => "a chat template",
            Holding::Text => "a text file",
            Holding::Binary => "a file of no kind that is known here",
        }
    }

    /// How to come to the file that should be there instead of a stand-in.
    pub(crate) fn remedy(self, path: &Path) -> Vec<String> {
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        match self {
            Holding::LfsPointer => vec![format!(
                "the repository was cloned without git-lfs: `git lfs install`, then `git lfs pull` in {}, or `hf download`",
                directory.display()
            )],
            Holding::Html => vec![
                "a page to log in at or an error was saved in its place: a gated model needs `hf auth login`, then `hf download`".to_owned(),
            ],
            _ => vec!["the download is not complete: fetch it again".to_owned()],
        }
    }
}

//! The kinds of things that can lie at a path.

use std::path::Path;

/// What lies at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holding {
    /// Nothing, or something that may not be looked at.
    Missing,
    /// A directory with config.json or weights.
    ModelDirectory,
    /// An adapter of PEFT or mlx-lm.
    Adapter,
    /// A directory that `finetune run` has written to.
    Run,
    /// A checkpoint of a run.
    Checkpoint,
    /// Any other directory.
    Directory,
    /// A directory with nothing in it.
    EmptyDirectory,
    /// A file of no bytes.
    EmptyFile,
    /// A TOML file.
    Recipe,
    /// A YAML file.
    Yaml,
    /// A model in llama.cpp's format, or a directory of one.
    Gguf,
    /// What git leaves of a large file if git-lfs is not installed.
    LfsPointer,
    /// A web page.
    Html,
    /// A gzip file.
    Gzip,
    /// A zstd file.
    Zstd,
    /// A zip file.
    Zip,
    /// A tar archive.
    Tar,
    /// A file packed with bzip2, xz or 7z.
    OtherPacked,
    /// A spreadsheet of Excel.
    Spreadsheet,
    /// A Parquet file.
    Parquet,
    /// An Arrow file.
    Arrow,
    /// A table with commas.
    Csv,
    /// A table with tabs.
    Tsv,
    /// A JSON file with one list.
    JsonArray,
    /// A JSON file with one object.
    JsonObject,
    /// A file of JSON objects, one on each line.
    JsonLines,
    /// Text in UTF-16.
    Utf16,
    /// Text in UTF-32.
    Utf32,
    /// torch's own format: `.bin`, `.pt`, `.pth`.
    Pickle,
    /// A safetensors file.
    Safetensors,
    /// A tokenizer.model of SentencePiece.
    SentencePiece,
    /// A chat template.
    Jinja,
    /// Any other text.
    Text,
    /// Any other file.
    Binary,
}

impl Holding {
    /// Its name with the article, as in "x is a Parquet file".
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
            Holding::Tar => "a tar archive",
            Holding::OtherPacked => "a file packed with bzip2, xz or 7z",
            Holding::Spreadsheet => "a spreadsheet",
            Holding::Parquet => "a Parquet file",
            Holding::Arrow => "an Arrow file",
            Holding::Csv => "a CSV file",
            Holding::Tsv => "a table with tabs (TSV)",
            Holding::JsonArray => "a JSON file with one list",
            Holding::JsonObject => "a JSON file with one object",
            Holding::JsonLines => "a file of rows, one JSON object a line",
            Holding::Utf16 => "a UTF-16 text file",
            Holding::Utf32 => "a UTF-32 text file",
            Holding::Pickle => "a pickle, torch's own format, which can run code when it is read",
            Holding::Safetensors => "a safetensors file",
            Holding::SentencePiece => "a SentencePiece tokenizer (tokenizer.model)",
            Holding::Jinja => "a chat template",
            Holding::Text => "a text file",
            Holding::Binary => "a file of no kind that is known here",
        }
    }

    /// How to get the file that should lie at `path` instead of this.
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

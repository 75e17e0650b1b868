//! Files that hold no rows of JSON: what they are, and what makes rows of them.

use std::path::Path;

use finetune_store::{Holding, recognize};

use crate::error::DatasetError;

/// Refuses a file that is known to be something else than lines of JSON objects.
pub(crate) fn refuse(path: &Path) -> Result<(), DatasetError> {
    let holding = recognize(path);
    match remedy(path, holding) {
        Some(remedy) => Err(DatasetError::OtherKind { path: path.to_owned(), what: holding.describe(), remedy }),
        None => Ok(()),
    }
}

/// What to do with a file of this kind. `None`: it may hold rows, or reading its lines tells more.
fn remedy(path: &Path, holding: Holding) -> Option<String> {
    let file = quoted(&path.display().to_string());
    let rows = quoted(&path.with_extension("jsonl").display().to_string());
    let pandas = |read: &str| {
        format!(
            "python -c \"import pandas, sys; pandas.{read}.to_json(sys.argv[2], orient='records', lines=True, \
             force_ascii=False)\" {file} {rows}"
        )
    };
    Some(match holding {
        Holding::Gzip => format!("unpack it: gunzip -k {file}"),
        Holding::Zstd => format!("unpack it: zstd -d {file}"),
        Holding::Zip => format!("unpack it: unzip {file}"),
        Holding::Parquet => pandas("read_parquet(sys.argv[1])"),
        Holding::Csv => pandas("read_csv(sys.argv[1])"),
        Holding::Tsv => pandas("read_csv(sys.argv[1], sep='\\t')"),
        Holding::Arrow => format!(
            "python -c \"import datasets, sys; datasets.Dataset.from_file(sys.argv[1]).to_json(sys.argv[2])\" {file} {rows}"
        ),
        Holding::JsonArray => format!("jq -c '.[]' {file} > {}", other_name(path)),
        Holding::Utf16 => format!("iconv -f UTF-16 -t UTF-8 {file} > {}", other_name(path)),
        Holding::LfsPointer => "fetch the file itself: git lfs pull, or hf download".to_owned(),
        Holding::Html => "fetch the file itself: on the hub, /resolve/ in its address in place of /blob/".to_owned(),
        Holding::Safetensors | Holding::Pickle | Holding::Gguf | Holding::SentencePiece => {
            "name a file of rows: this is of a model".to_owned()
        }
        Holding::ModelDirectory
        | Holding::Adapter
        | Holding::Run
        | Holding::Checkpoint
        | Holding::Directory
        | Holding::EmptyDirectory => "name a file of rows".to_owned(),
        Holding::Missing
        | Holding::EmptyFile
        | Holding::Recipe
        | Holding::Yaml
        | Holding::JsonObject
        | Holding::JsonLines
        | Holding::Jinja
        | Holding::Text
        | Holding::Binary => return None,
    })
}

/// A name for the rows that differs from the file's own.
fn other_name(path: &Path) -> String {
    let is_rows = path.extension().is_some_and(|extension| extension == "jsonl");
    quoted(&path.with_extension(if is_rows { "rows.jsonl" } else { "jsonl" }).display().to_string())
}

/// A text as one word of a shell.
fn quoted(text: &str) -> String {
    let is_plain = |character: char| character.is_alphanumeric() || "/._-+:@".contains(character);
    if text.chars().all(is_plain) { text.to_owned() } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remedies_name_the_file_as_a_word() {
        let path = Path::new("my rows/it's.parquet");
        let remedy = remedy(path, Holding::Parquet).expect("a way");
        assert!(remedy.ends_with(r"'my rows/it'\''s.parquet' 'my rows/it'\''s.jsonl'"), "{remedy}");
        let array = super::remedy(Path::new("a.jsonl"), Holding::JsonArray);
        assert_eq!(array.as_deref(), Some("jq -c '.[]' a.jsonl > a.rows.jsonl"));
        assert_eq!(super::remedy(path, Holding::Text), None);
    }
}

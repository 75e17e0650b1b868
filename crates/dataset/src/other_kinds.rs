//! Files that hold no rows: what they are, and what makes rows of them.

use std::path::Path;

use finetune_store::Holding;

use crate::error::DatasetError;
use crate::kinds::Packing;

/// Refuses a file that is known to hold no rows. `holding` is what it holds, once unpacked.
pub(crate) fn refuse(path: &Path, holding: Holding, packing: Packing) -> Result<(), DatasetError> {
    let is_named_parquet = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("parquet"));
    if is_named_parquet && matches!(holding, Holding::Text | Holding::Binary) {
        let reason = "it does not begin as one".to_owned();
        return Err(DatasetError::Damaged { path: path.to_owned(), what: "Parquet file", reason });
    }
    let Some(remedy) = remedy(path, holding) else { return Ok(()) };
    let unpack = match packing {
        Packing::Plain => None,
        Packing::Gzip => Some(format!("unpack it: gunzip -k {}", quoted(&path.display().to_string()))),
        Packing::Zstd => Some(format!("unpack it: zstd -d {}", quoted(&path.display().to_string()))),
    };
    let (what, remedy) = match (holding, unpack) {
        (_, None) => (holding.describe(), remedy),
        (Holding::Parquet, Some(unpack)) => ("a Parquet file that was packed once more", unpack),
        (Holding::Gzip | Holding::Zstd, Some(unpack)) => ("packed twice", unpack),
        (Holding::Tar, Some(_)) => ("a packed tar archive", remedy),
        (_, Some(_)) => (holding.describe(), remedy),
    };
    Err(DatasetError::OtherKind { path: path.to_owned(), what, remedy })
}

/// What to do with a file of this kind. `None`: it may hold rows, or reading its lines tells more.
fn remedy(path: &Path, holding: Holding) -> Option<String> {
    let file = quoted(&path.display().to_string());
    let rows = quoted(&path.with_extension("jsonl").display().to_string());
    Some(match holding {
        Holding::Gzip => format!("unpack it: gunzip -k {file}"),
        Holding::Zstd => format!("unpack it: zstd -d {file}"),
        Holding::Zip => format!("unpack it: unzip {file}"),
        Holding::Tar => format!("unpack it: tar xf {file}"),
        Holding::OtherPacked => "unpack it with bunzip2, unxz or 7z; gzip and zstd are read as they are".to_owned(),
        Holding::Spreadsheet => "save its sheet as CSV (UTF-8)".to_owned(),
        Holding::Arrow => format!(
            "python -c \"import datasets, sys; datasets.Dataset.from_file(sys.argv[1]).to_json(sys.argv[2])\" {file} {rows}"
        ),
        Holding::Utf16 => format!("iconv -f UTF-16 -t UTF-8 {file} > {}", other_name(path)),
        Holding::Utf32 => format!("iconv -f UTF-32 -t UTF-8 {file} > {}", other_name(path)),
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
        // Read as they are. Parquet within another packing needs to be unpacked.
        Holding::Parquet => "unpack it".to_owned(),
        Holding::Csv | Holding::Tsv | Holding::JsonArray => return None,
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
    let extension = path.extension().map_or("jsonl".into(), |extension| extension.to_string_lossy());
    quoted(&path.with_extension(format!("utf8.{extension}")).display().to_string())
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
        let path = Path::new("my rows/it's.arrow");
        let remedy = remedy(path, Holding::Arrow).expect("a way");
        assert!(remedy.ends_with(r"'my rows/it'\''s.arrow' 'my rows/it'\''s.jsonl'"), "{remedy}");
        let utf16 = super::remedy(Path::new("a.csv"), Holding::Utf16);
        assert_eq!(utf16.as_deref(), Some("iconv -f UTF-16 -t UTF-8 a.csv > a.utf8.csv"));
        assert_eq!(super::remedy(path, Holding::Text), None);
    }
}

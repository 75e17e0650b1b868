//! Paths are joined to the recipe's folder and normalized by their text alone, as the files may not
//! exist yet.

use std::path::{Component, Path, PathBuf};

/// The path without `.`, and without `..` if a folder stands before it.
pub(crate) fn normalized(path: &Path) -> PathBuf {
    let mut result = PathBuf::new();
    for component in path.components() {
        match (component, result.components().next_back()) {
            (Component::CurDir, _) => {}
            (Component::ParentDir, Some(Component::Normal(_))) => {
                result.pop();
            }
            (Component::ParentDir, Some(Component::RootDir | Component::Prefix(_))) => {}
            _ => result.push(component),
        }
    }
    if result.as_os_str().is_empty() { PathBuf::from(".") } else { result }
}

/// A path that is relative to the folder of `recipe_file`.
pub(crate) fn joined(recipe_file: &Path, path: &str) -> PathBuf {
    normalized(&recipe_file.parent().unwrap_or(Path::new("")).join(path))
}

/// The path without the current directory.
pub(crate) fn absolute(path: &Path) -> PathBuf {
    // This fails only without a current directory. The relative path is then the best there is.
    std::path::absolute(path).map_or_else(|_| path.to_path_buf(), |path| normalized(&path))
}

/// Whether a text is `name` or `owner/name` as the Hugging Face hub allows them. `@revision` may
/// follow.
pub(crate) fn is_hub_id(text: &str) -> bool {
    let (text, revision) = text.split_once('@').map_or((text, None), |(name, revision)| (name, Some(revision)));
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "-_./".contains(letter);
    if revision.is_some_and(|revision| revision.is_empty() || !revision.chars().all(plain)) {
        return false;
    }
    let part = |part: &str| {
        !part.is_empty()
            && part.len() <= 96
            && !part.starts_with(['.', '-'])
            && !part.ends_with(['.', '-'])
            && part.chars().all(|letter| letter.is_ascii_alphanumeric() || "-_.".contains(letter))
    };
    text.split('/').count() <= 2 && text.split('/').all(part)
}

/// What the name of a data set of the hub begins with.
pub const HUB_ROWS: &str = "hf://";

/// Whether an entry of `data.train` or `data.eval` is a data set of the hub, which has to be fetched
/// before it can be read.
pub fn is_hub_rows(path: &Path) -> bool {
    path.to_string_lossy().starts_with(HUB_ROWS)
}

/// What is wrong with `hf://owner/name`, behind which `@revision` and parts of a path may follow.
/// `hf://datasets/owner/name` is the same.
pub(crate) fn hub_rows_fault(text: &str) -> Option<&'static str> {
    let rest = text.strip_prefix(HUB_ROWS)?;
    let rest = rest.strip_prefix("datasets/").unwrap_or(rest);
    let parts: Vec<&str> = rest.trim_end_matches('/').split('/').collect();
    let [owner, name, within @ ..] = parts.as_slice() else { return Some("an owner and a name are needed") };
    if !is_hub_id(&format!("{owner}/{name}")) || owner.contains('@') {
        return Some("owner and name are letters, digits and `-_.`");
    }
    let plain = |part: &&str| !part.is_empty() && *part != "." && *part != ".." && part.len() <= 96;
    if within.len() > 8 || !within.iter().all(plain) {
        return Some("behind the name a split, or a path within the data set, may follow");
    }
    None
}

/// `owner/name` of the hub's page of a data set: `https://huggingface.co/datasets/owner/name`.
pub(crate) fn hub_page(text: &str) -> Option<String> {
    let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"))?;
    let rest = rest.strip_prefix("huggingface.co/datasets/").or_else(|| rest.strip_prefix("hf.co/datasets/"))?;
    let name = rest.split('/').take(2).collect::<Vec<_>>().join("/");
    (name.contains('/') && is_hub_id(&name)).then_some(name)
}

/// The value of `model.path`: the directory or file if it exists or the text cannot be a hub id, else
/// the hub id as written. A text that ends as a GGUF file does is no hub id.
pub(crate) fn model(recipe_file: &Path, text: &str) -> String {
    let directory = joined(recipe_file, text);
    if is_hub_id(text) && !text.ends_with(".gguf") && !directory.exists() {
        return text.to_owned();
    }
    let directory = directory.to_string_lossy().into_owned();
    // The directory "models/Qwen3" must not be taken for a hub id later.
    if is_hub_id(&directory) { format!("./{directory}") } else { directory }
}

#[cfg(test)]
mod tests {
    use super::{hub_page, hub_rows_fault, is_hub_id};

    #[test]
    fn hub_ids_with_and_without_a_revision() {
        for id in ["gpt2", "acme/tiny", "acme/tiny@v2", "acme/tiny@refs/pr/3"] {
            assert!(is_hub_id(id), "{id}");
        }
        for text in ["hf://acme/rows", "hf://acme/rows@v2/train", "hf://datasets/acme/rows/data/train.parquet"] {
            assert_eq!(hub_rows_fault(text), None, "{text}");
        }
        for text in ["hf://", "hf://acme", "hf://a b/c", "hf://acme/rows//train", "hf://acme/rows/../x", "hf://a@b/c"] {
            assert!(hub_rows_fault(text).is_some(), "{text}");
        }
        assert_eq!(hub_page("https://huggingface.co/datasets/acme/rows/viewer").as_deref(), Some("acme/rows"));
        assert_eq!(hub_page("https://example.com/rows.jsonl"), None);
        for text in ["", "./tiny", "a/b/c", "acme/tiny@", "acme/tiny@v 2", "@v2", "acme/tiny@v2@v3"] {
            assert!(!is_hub_id(text), "{text}");
        }
    }
}

//! Which files of a repository are fetched.

use finetune_store::HubId;

use crate::error::HubError;
use crate::repository::Listed;

/// What a caller needs of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Need {
    /// A model or adapter: safetensors, configuration, tokenizer, chat template, and the card.
    Model,
    /// The same without weights.
    Text,
    /// The same as [`Need::Model`]. Of weights in several files only the headers, which are kept apart from the
    /// snapshot: they say who needs which file.
    Headers,
    /// These files of weights, by their names.
    Shards(Vec<String>),
    /// Files that match one of these patterns. `*` matches every text, `/` in it too.
    Files(Vec<String>),
    /// Everything.
    All,
}

/// Names in the top folder of a repository that models and adapters are read from, beside weights.
const SMALL: [&str; 22] = [
    "config.json",
    // How GPTQ and AWQ packed the weights, of uploads whose config.json does not say it.
    "quantize_config.json",
    "quant_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "tekken.json",
    "tiktoken.model",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
    "adapter_config.json",
    "README.md",
    "LICENSE",
    "preprocessor_config.json",
];

/// Endings of weights in formats that are not read, or not chosen among without being asked.
const FOREIGN: [&str; 7] = [".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"];

/// The most names that a message lists.
const SHOWN: usize = 6;

/// Whether this is one of the weights that models and adapters are read from.
fn is_weights(path: &str) -> bool {
    let Some(stem) = path.strip_suffix(".safetensors") else { return false };
    if ["model", "adapter_model", "adapters"].contains(&stem) {
        return true;
    }
    // `model-00001-of-00002`; a copy of the same weights in another layout is `consolidated-…`.
    let mut parts = stem.rsplitn(4, '-');
    let number = |text: Option<&str>| text.is_some_and(|text| text.len() >= 5 && text.parse::<u32>().is_ok());
    number(parts.next())
        && parts.next() == Some("of")
        && number(parts.next())
        && parts.next().is_some_and(|name| !name.is_empty() && !name.starts_with("consolidated"))
}

/// Whether the weights are in several files, and an index says which tensor is in which.
fn is_split(listing: &[Listed]) -> bool {
    let has = |name: &str| listing.iter().any(|file| file.path == name);
    has("model.safetensors.index.json") && !has("model.safetensors")
}

fn is_small(path: &str) -> bool {
    // How a text is split stands in the module beside a file of ranks (tiktoken.model).
    let is_ranks = path.ends_with(".tiktoken") || (path.starts_with("tokenization_") && path.ends_with(".py"));
    SMALL.contains(&path)
        || (is_ranks && !path.contains('/'))
        || (path.ends_with(".jinja") && path.split('/').count() <= 2)
}

/// The wanted files of a listing, small ones first: weights are useless without them.
pub(crate) fn select(need: &Need, id: &HubId, listing: &[Listed]) -> Result<Vec<Listed>, HubError> {
    let patterns: Vec<glob::Pattern> = match need {
        Need::Files(texts) => texts.iter().map(|text| pattern(text)).collect::<Result<_, _>>()?,
        _ => Vec::new(),
    };
    let wanted = |path: &str| match need {
        Need::Model => is_small(path) || is_weights(path),
        Need::Text => is_small(path),
        Need::Headers => is_small(path) || (is_weights(path) && !is_split(listing)),
        Need::Shards(names) => names.iter().any(|name| name == path),
        Need::Files(_) => patterns.iter().any(|pattern| pattern.matches(path)),
        Need::All => path != ".gitattributes",
    };
    let mut files: Vec<Listed> = listing.iter().filter(|file| wanted(&file.path)).cloned().collect();
    let names = |all: &[Listed], keep: &dyn Fn(&str) -> bool| {
        let names: Vec<&str> = all.iter().map(|file| file.path.as_str()).filter(|path| keep(path)).collect();
        let more = if names.len() > SHOWN { format!(" and {} more", names.len() - SHOWN) } else { String::new() };
        format!("{}{more}", names[..names.len().min(SHOWN)].join(", "))
    };
    let is_foreign = |path: &str| FOREIGN.iter().any(|ending| path.ends_with(ending)) && !path.contains('/');
    if matches!(need, Need::Model | Need::Text | Need::Headers) && !listing.iter().any(|file| is_weights(&file.path)) {
        // Config and tokenizer are in the file too.
        let model = only_gguf(listing);
        let found = names(listing, &is_foreign);
        match (model.is_empty(), found.is_empty()) {
            (false, _) => files.extend(model.into_iter().cloned()),
            (true, false) if *need != Need::Text => {
                return Err(HubError::NoSafetensors { id: id.name.clone(), found });
            }
            (true, _) => {}
        }
    }
    if files.is_empty() {
        let found = names(listing, &|_| true);
        let wanted = match need {
            Need::Files(patterns) => format!("that matches {}", patterns.join(" or ")),
            Need::Shards(names) => format!("of the name {}", names.join(" or ")),
            _ => "of a model or adapter".to_owned(),
        };
        let found = if found.is_empty() { "none".to_owned() } else { found };
        return Err(HubError::NoFile { id: id.name.clone(), wanted, found });
    }
    files.sort_by(|a, b| (is_weights(&a.path), a.size, &a.path).cmp(&(is_weights(&b.path), b.size, &b.path)));
    Ok(files)
}

/// The files of the GGUF model in the top folder, if there is only one. A projector of images and the
/// data of a quantizer are none.
fn only_gguf(listing: &[Listed]) -> Vec<&Listed> {
    let beside = |path: &str| ["mmproj", "imatrix"].iter().any(|word| path.contains(word));
    let files = listing.iter().filter(|file| file.path.ends_with(".gguf") && !file.path.contains('/'));
    let models: Vec<&Listed> = files.filter(|file| !beside(&file.path)).collect();
    // `tiny-00001-of-00003.gguf` and its like are one model.
    let stem = |file: &&Listed| {
        let name = file.path.trim_end_matches(".gguf");
        let split = name.rsplit_once("-of-").and_then(|(rest, _)| rest.rsplit_once('-'));
        split.map_or(name, |(stem, _)| stem).to_owned()
    };
    let mut stems: Vec<String> = models.iter().map(stem).collect();
    stems.dedup();
    if stems.len() == 1 { models } else { Vec::new() }
}

/// A pattern as Python's `fnmatch` reads it. A folder stands for everything in it.
fn pattern(text: &str) -> Result<glob::Pattern, HubError> {
    let whole = if text.ends_with('/') { format!("{text}*") } else { text.to_owned() };
    glob::Pattern::new(&whole).map_err(|_| HubError::NoFile {
        id: "the repository".to_owned(),
        wanted: format!("that matches {text}, which is no pattern"),
        found: "others".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(names: &[&str]) -> Vec<Listed> {
        let file = |name: &&str| Listed { path: (*name).to_owned(), size: 1, oid: String::new(), large: false };
        names.iter().map(file).collect()
    }

    #[test]
    fn only_what_is_needed_is_fetched() {
        let all = [
            ".gitattributes",
            "README.md",
            "config.json",
            "consolidated-00001-of-00002.safetensors",
            "consolidated.safetensors",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "onnx/model.onnx",
            "optimizer.safetensors",
            "original/model.safetensors",
            "modeling_own.py",
            "original/own.tiktoken",
            "own.tiktoken",
            "pytorch_model.bin",
            "tiktoken.model",
            "tokenization_own.py",
            "tokenizer.json",
            "training_args.bin",
        ];
        let shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
        let text = [
            "README.md",
            "config.json",
            "model.safetensors.index.json",
            "own.tiktoken",
            "tiktoken.model",
            "tokenization_own.py",
            "tokenizer.json",
        ];
        let cases = [
            (Need::Model, [&text[..], &shards].concat()),
            (Need::Text, text.to_vec()),
            (Need::Headers, text.to_vec()),
            (Need::Shards(vec![shards[1].to_owned()]), vec![shards[1]]),
            (Need::Files(vec!["*.bin".to_owned()]), vec!["pytorch_model.bin", "training_args.bin"]),
            (Need::Files(vec!["onnx/".to_owned()]), vec!["onnx/model.onnx"]),
        ];
        let id = HubId::parse("acme/tiny").expect("an id");
        for (need, want) in cases {
            let files = select(&need, &id, &listing(&all)).expect("files");
            assert_eq!(files.iter().map(|file| file.path.as_str()).collect::<Vec<_>>(), want, "{need:?}");
        }
        assert_eq!(select(&Need::All, &id, &listing(&all)).expect("files").len(), all.len() - 1);
    }

    /// (what is in the repository, the weights that are fetched)
    #[test]
    fn the_only_gguf_model_of_a_repository_is_fetched() {
        let id = HubId::parse("acme/tiny").expect("an id");
        let parts = ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"];
        for (names, want) in [
            (&["README.md", "a-Q4_0.gguf", "mmproj-a.gguf"][..], &["a-Q4_0.gguf"][..]),
            (&parts, &parts),
            (&["config.json", "tokenizer.json", "a-Q4_0.gguf", "model.safetensors"], &[]),
        ] {
            let files = select(&Need::Model, &id, &listing(names)).expect("files");
            let found: Vec<&str> = files.iter().map(|file| file.path.as_str()).collect();
            let found: Vec<&str> = found.into_iter().filter(|path| path.ends_with(".gguf")).collect();
            assert_eq!(found, want, "{names:?}");
        }
    }

    #[test]
    fn a_repository_without_safetensors_says_so() {
        let id = HubId::parse("acme/tiny").expect("an id");
        for (names, message) in [
            (
                &["config.json", "pytorch_model.bin"][..],
                "acme/tiny has its weights as pytorch_model.bin, and none as safetensors",
            ),
            (
                &["a-Q4_0.gguf", "a-Q8_0.gguf"],
                "acme/tiny has its weights as a-Q4_0.gguf, a-Q8_0.gguf, and none as safetensors",
            ),
            (&["data.csv"], "acme/tiny has no file of a model or adapter; it has data.csv"),
            (&[], "acme/tiny has no file of a model or adapter; it has none"),
        ] {
            assert_eq!(select(&Need::Model, &id, &listing(names)).unwrap_err().to_string(), message);
        }
    }
}

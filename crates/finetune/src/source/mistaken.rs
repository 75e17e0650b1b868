//! Errors about a path that holds something else than a command needs. They say what it is, and
//! which command or key is meant.

use std::path::{Path, PathBuf};

use finetune_store::{Holding, HubId, recognize};

use super::fetch;
use crate::failure::Failure;

/// The most names of a directory that a message lists.
const SHOWN: usize = 6;

fn said(message: String, hints: Vec<String>) -> Failure {
    Failure::bad_input(message, hints)
}

/// The error for a path with nothing at it, nor in the cache.
pub(super) fn missing(path: &Path) -> Failure {
    let text = path.to_string_lossy();
    if let Some(failure) = address(&text) {
        return failure;
    }
    let hint = beside(path).unwrap_or_else(|| {
        "the path is relative to the current directory; a model of the hub is called OWNER/NAME".to_owned()
    });
    said(format!("there is no {text}"), vec![hint])
}

/// The error for an address on the web.
fn address(text: &str) -> Option<Failure> {
    let (_, rest) = text.split_once("://")?;
    let at_hub = rest.strip_prefix("huggingface.co/").or_else(|| rest.strip_prefix("hf.co/"));
    let id: Option<String> = at_hub.map(|path| path.split('/').take(2).collect::<Vec<_>>().join("/"));
    Some(match id.as_deref().and_then(HubId::parse) {
        Some(id) => said(
            format!("{text} is an address; the model is called {} here", id.name),
            vec![format!("{} fetches it, then {} names it", fetch(&id), id.name)],
        ),
        None => said(
            format!("{text} is an address, and nothing is downloaded here"),
            vec!["download it first, and name the directory".to_owned()],
        ),
    })
}

/// A hint that lists the parent directory of a path, if there is one.
fn beside(path: &Path) -> Option<String> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty())?;
    let names = names(parent, |_| true);
    (!names.is_empty()).then(|| format!("in {} there is {}", parent.display(), listed(&names)))
}

/// Names in a directory, sorted, without hidden ones.
fn names(directory: &Path, wanted: impl Fn(&Path) -> bool) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().filter_map(Result::ok);
    let mut names: Vec<String> = entries
        .filter(|entry| wanted(&entry.path()))
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| !name.starts_with('.'))
        .collect();
    names.sort();
    names
}

fn listed(names: &[String]) -> String {
    let more = if names.len() > SHOWN { format!(" and {} more", names.len() - SHOWN) } else { String::new() };
    format!("{}{more}", names[..names.len().min(SHOWN)].join(", "))
}

/// The directory of a file, and what it holds, if a command takes such a directory.
fn owner(path: &Path) -> Option<(&Path, Holding)> {
    let parent = path.parent().map(|parent| if parent.as_os_str().is_empty() { Path::new(".") } else { parent })?;
    let holding = recognize(parent);
    matches!(holding, Holding::ModelDirectory | Holding::Adapter | Holding::Checkpoint | Holding::Run)
        .then_some((parent, holding))
}

/// The error for a path that should hold a model, a run or an adapter.
pub(super) fn not_a_model(path: &Path, holding: Holding) -> Failure {
    let (shown, what) = (path.display(), holding.describe());
    if let Some((directory, kind)) = owner(path).filter(|_| path.is_file()) {
        return said(
            format!("{shown} is one file of {}, {}: the directory is meant", directory.display(), kind.describe()),
            vec![],
        );
    }
    match holding {
        Holding::Recipe => said(
            format!("{shown} is {what}: a model, a run or an adapter is meant"),
            vec![format!("`finetune run {shown}` trains as a recipe says; then name its output_dir here")],
        ),
        Holding::JsonLines | Holding::JsonArray | Holding::Csv | Holding::Tsv | Holding::Parquet | Holding::Arrow => {
            said(
                format!(
                    "{shown} is {what}: rows are named with --data, and a model, a run or an adapter is meant here"
                ),
                vec![],
            )
        }
        Holding::Directory => {
            let inside = names(path, |path| {
                matches!(
                    recognize(path),
                    Holding::ModelDirectory | Holding::Adapter | Holding::Checkpoint | Holding::Run
                )
            });
            said(
                format!("{shown} is a directory without a config.json: it holds no model, run or adapter itself"),
                if inside.is_empty() {
                    vec!["a model directory has config.json, tokenizer.json and model.safetensors".to_owned()]
                } else {
                    vec![format!("in it are {}", listed(&inside))]
                },
            )
        }
        _ => said(
            format!("{shown} is {what}: a model, a run or an adapter is meant"),
            vec![
                "a model directory has config.json, tokenizer.json and model.safetensors (or shards with their index)"
                    .to_owned(),
            ],
        ),
    }
}

/// The error for a directory that has several GGUF models, or none that can be named.
pub(super) fn several_ggufs(directory: &Path, models: &[PathBuf]) -> Failure {
    let shown = directory.display();
    let names: Vec<String> =
        models.iter().filter_map(|path| path.file_name()).map(|name| name.to_string_lossy().into_owned()).collect();
    match names.first() {
        None => said(format!("{shown} has no GGUF file that can be read"), vec![]),
        Some(first) => said(
            format!("{shown} has several GGUF models: {}", listed(&names)),
            vec![format!("name one of them, such as {}", directory.join(first).display())],
        ),
    }
}

/// The error for a path that should hold an adapter.
pub(super) fn not_an_adapter(path: &Path, holding: Holding) -> Failure {
    let (shown, what) = (path.display(), holding.describe());
    if let Some((directory, Holding::Adapter | Holding::Checkpoint)) = owner(path).filter(|_| path.is_file()) {
        let kind = recognize(directory).describe();
        return said(format!("{shown} is one file of {}, {kind}: the directory is meant", directory.display()), vec![]);
    }
    let inside = if path.is_dir() { names(path, |path| recognize(path) == Holding::Adapter) } else { Vec::new() };
    match (holding, inside.as_slice()) {
        (Holding::ModelDirectory, []) => said(
            format!("{shown} is {what}, not an adapter"),
            vec!["name it as the model, in the first place of the command".to_owned()],
        ),
        (_, [name]) => said(
            format!("{shown} holds the adapter {name} in a folder of its own: {} is meant", path.join(name).display()),
            vec![],
        ),
        (_, [_, ..]) => {
            said(format!("{shown} holds several adapters: {}", listed(&inside)), vec!["name one of them".to_owned()])
        }
        _ => said(
            format!("{shown} is {what}, not an adapter"),
            vec!["a run, a checkpoint, or a directory with adapter_config.json and its tensors is meant".to_owned()],
        ),
    }
}

/// The error for a path that should hold a recipe.
pub(super) fn not_a_recipe(path: &Path, holding: Holding) -> Failure {
    let (shown, what) = (path.display(), holding.describe());
    // A link to nothing is no help.
    let is_toml = |path: &Path| path.is_file() && path.extension().is_some_and(|extension| extension == "toml");
    let toml = |directory: &Path| names(directory, is_toml);
    match holding {
        Holding::Missing => {
            let text = path.to_string_lossy();
            if let Some(failure) = address(&text) {
                return failure;
            }
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
            let there = toml(parent);
            said(
                format!("there is no recipe {shown}"),
                vec![match there.as_slice() {
                    [] => {
                        "the path is relative to the current directory; `finetune init DIR` writes a recipe".to_owned()
                    }
                    _ => format!("in {} there is {}", parent.display(), listed(&there)),
                }],
            )
        }
        Holding::Yaml => {
            let of = rival(path).map_or("as other programs have them".to_owned(), |name| format!("as {name} has them"));
            said(
                format!("{shown} is a YAML file, {of}; recipes are TOML here"),
                vec![format!("`finetune import {shown} --output recipe.toml` makes one of it")],
            )
        }
        Holding::JsonLines | Holding::JsonArray | Holding::Csv | Holding::Tsv | Holding::Parquet | Holding::Arrow => {
            said(
                format!(
                    "{shown} is {what}: rows are named by `train` in [data] of a recipe, and a recipe is meant here"
                ),
                vec![],
            )
        }
        Holding::ModelDirectory => said(
            format!("{shown} is {what}: it is named by `path` in [model] of a recipe, and a recipe is meant here"),
            vec![],
        ),
        Holding::Adapter => said(
            format!("{shown} is {what}: `init_from` in [lora] of a recipe starts from it, and a recipe is meant here"),
            vec![],
        ),
        Holding::Checkpoint => {
            said(format!("{shown} is {what}: `finetune run RECIPE.toml --resume {shown}` goes on from it"), vec![])
        }
        Holding::Run => said(
            format!("{shown} is {what} without its recipe.toml"),
            vec![format!("name the recipe: `finetune run RECIPE.toml --output-dir {shown} --resume` goes on with it")],
        ),
        Holding::Directory | Holding::EmptyDirectory => {
            let there = toml(path);
            said(
                format!("{shown} is a directory, and a recipe is a TOML file"),
                if there.is_empty() { vec![] } else { vec![format!("in it there is {}", listed(&there))] },
            )
        }
        _ => said(
            format!("{shown} is {what}, and a recipe is a TOML file"),
            vec!["`finetune init DIR` writes one to begin with".to_owned()],
        ),
    }
}

/// The error for a file of rows that is not there.
pub(super) fn no_rows(option: &str, path: &Path) -> Failure {
    let text = path.to_string_lossy();
    if text.contains("://") {
        return said(
            format!("{option} {text} is an address, and nothing is downloaded here"),
            vec!["download it first, and name the file".to_owned()],
        );
    }
    let hint = beside(path).unwrap_or_else(|| "the path is relative to the current directory".to_owned());
    said(format!("{option} {text}: there is no such file"), vec![hint])
}

/// The error for a directory in place of one file of rows.
pub(super) fn directory_of_rows(option: &str, path: &Path) -> Failure {
    let shown = path.display();
    const EXTENSIONS: [&str; 8] = ["jsonl", "ndjson", "json", "csv", "tsv", "parquet", "gz", "zst"];
    let is_rows = |path: &Path| {
        let extension = path.extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
        EXTENSIONS.contains(&extension.as_str())
    };
    let there = names(path, is_rows);
    said(
        format!("{option} {shown} is {}: one file of rows is meant", recognize(path).describe()),
        if there.is_empty() { vec![] } else { vec![format!("in it there is {}", listed(&there))] },
    )
}

/// The program whose recipe a YAML file is, by the keys that only this program has.
fn rival(path: &Path) -> Option<&'static str> {
    use std::io::Read;
    const KEYS: [(&str, &str); 8] = [
        ("_component_", "torchtune"),
        ("model_name_or_path:", "LLaMA-Factory"),
        ("finetuning_type:", "LLaMA-Factory"),
        ("base_model:", "axolotl"),
        ("sequence_len:", "axolotl"),
        ("lora_parameters:", "mlx-lm"),
        ("iters:", "mlx-lm"),
        ("adapter_path:", "mlx-lm"),
    ];
    let mut bytes = Vec::new();
    std::fs::File::open(path).ok()?.take(1 << 16).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let is_there = |key: &str| text.lines().any(|line| line.trim_start().starts_with(key));
    KEYS.iter().find(|(key, _)| is_there(key)).map(|(_, name)| *name)
}

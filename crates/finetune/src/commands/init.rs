//! `finetune init`: a recipe and rows to begin with, which run as they are.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use finetune_dataset::{matched, resolve_files};
use finetune_hub::DatasetName;
use finetune_store::{Disk, Holding, HubId, RealDisk, ensure_directory, recognize};

use super::import::{refuse_to_replace, write_whole};
use crate::cli::InitArguments;
use crate::failure::Failure;
use crate::progress::Verbosity;
use crate::source::Named;
use crate::stderr::complain;
use crate::{closing, hub_files, source};

/// Customers' messages and the tickets that answer them, some of the quickstart's: every answer has
/// one form, so that a run shows what it learned.
const TRAIN: &str = include_str!("../starter/train.jsonl");
const VALID: &str = include_str!("../starter/valid.jsonl");

/// Where the model that comes with finetune lies, below the folder of the sources or of an
/// installation.
const SHIPPED: [&str; 2] = ["datasets/quickstart/base", "share/finetune/quickstart/base"];
/// What is trained if there is none: small, and it has learned to chat.
const SMALL_MODEL: &str = "HuggingFaceTB/SmolLM2-135M-Instruct";

/// The model of a new recipe.
enum Model {
    /// The tiny one that comes with finetune.
    Shipped(PathBuf),
    /// A directory or a GGUF file. `packed`: how its matrices are packed, in words.
    Directory { path: PathBuf, packed: Option<String> },
    /// A hub id.
    Hub(String),
}

pub(crate) fn init(arguments: &InitArguments, verbosity: Verbosity) -> Result<ExitCode, Failure> {
    let directory = &arguments.directory;
    let model = model(arguments.model.as_deref())?;
    let own_rows = arguments.data.as_deref().map(rows).transpose()?;
    let recipe = directory.join("recipe.toml");
    let mut files = vec![
        (recipe.clone(), text(&model, own_rows.as_deref())),
        (directory.join("recipe.schema.json"), finetune_recipe::schema::json()),
    ];
    if own_rows.is_none() {
        files.push((directory.join("data/train.jsonl"), TRAIN.to_owned()));
        files.push((directory.join("data/valid.jsonl"), VALID.to_owned()));
    }
    files.iter().try_for_each(|(path, _)| refuse_to_replace(path))?;
    for (index, (path, text)) in files.iter().enumerate() {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let written = ensure_directory(&RealDisk, folder).map_err(Failure::from).and_then(|()| write_whole(path, text));
        if written.is_err() {
            // None of them was there before, and half of them would be in the way of another try.
            files[..index].iter().for_each(|(path, _)| drop(RealDisk.remove_file(path)));
        }
        written?;
    }
    if verbosity > Verbosity::Quiet {
        let names: Vec<String> = files.iter().map(|(path, _)| path.display().to_string()).collect();
        complain!("wrote {}", names.join(", "));
        next(&model, arguments, &recipe).iter().for_each(|line| complain!("{line}"));
    }
    Ok(ExitCode::SUCCESS)
}

/// What to type next.
fn next(model: &Model, arguments: &InitArguments, recipe: &Path) -> Vec<String> {
    let recipe = closing::path(recipe);
    let mut lines = Vec::new();
    if let Model::Hub(id) = model {
        if arguments.model.is_none() {
            lines.push(format!("the model that comes with finetune is not installed here, so the recipe names {id}"));
        }
        lines.push(format!("fetch it   finetune download {id}"));
    }
    lines.push(format!("check      finetune validate {recipe}"));
    lines.push(format!("train      finetune run {recipe}"));
    lines
}

fn model(given: Option<&str>) -> Result<Model, Failure> {
    let Some(given) = given else {
        return Ok(shipped().map_or_else(|| Model::Hub(SMALL_MODEL.to_owned()), Model::Shipped));
    };
    let path = Path::new(given);
    match recognize(path) {
        Holding::ModelDirectory | Holding::Gguf => match source::named(path, &mut Vec::new())? {
            Named::Model(path) | Named::Adapter(path) => {
                // What cannot be read is said by `validate`, which the recipe is made for.
                let packed = finetune_model::Model::form(&path, None).ok().and_then(|form| form.words);
                Ok(Model::Directory { path: std::path::absolute(path)?, packed })
            }
        },
        Holding::Missing if HubId::parse(given).is_some_and(|id| id.name.contains('/')) => {
            Ok(Model::Hub(given.to_owned()))
        }
        Holding::Missing => Err(Failure::arguments(
            format!("--model {given}: there is no such directory"),
            "name a model directory, or a hub id such as Qwen/Qwen3-0.6B",
        )),
        holding => Err(Failure::arguments(
            format!("--model {given} is {}, and a model is meant", holding.describe()),
            "name a model directory, or a hub id such as Qwen/Qwen3-0.6B",
        )),
    }
}

/// The tiny model of the quickstart, above the current directory or the program.
fn shipped() -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?;
    let here = std::env::current_dir().ok()?;
    let folders = here.ancestors().chain(program.ancestors().skip(1));
    let mut places = folders.flat_map(|folder| SHIPPED.map(|name| folder.join(name)));
    places.find(|place| recognize(place) == Holding::ModelDirectory)
}

/// The absolute path of the user's rows, or their name on the hub.
fn rows(path: &Path) -> Result<PathBuf, Failure> {
    if hub_files::is_rows(path) {
        DatasetName::parse(&path.to_string_lossy())?;
        return Ok(path.to_owned());
    }
    let files = if path.is_dir() { Vec::new() } else { matched(path)? };
    files.iter().try_for_each(|file| source::data_file("--data", file))?;
    resolve_files(&[path.to_owned()], &[])?;
    Ok(std::path::absolute(path)?)
}

/// A path as a TOML string.
fn quoted(path: &Path) -> String {
    serde_json::Value::from(path.to_string_lossy()).to_string()
}

/// The recipe. It has the keys that a newcomer wants to change, and no others.
fn text(model: &Model, own_rows: Option<&Path>) -> String {
    // Of the few rows that are written, fewer steps would hardly change the adapter.
    let (epochs, rows_per_update) = if own_rows.is_some() { (3, 8) } else { (4, 4) };
    let epochs = format!("epochs = {epochs}                        # how often each row is read");
    let (path, rate, steps, rows_per_update, about) = match model {
        Model::Shipped(path) => (
            quoted(path),
            "5e-3",
            "max_steps = 60                    # updates of the adapter; or epochs = 3".to_owned(),
            8,
            "#\n\
             # The model is the tiny one that comes with finetune (0.9 million parameters): it learns to answer\n\
             # a customer's message with a ticket, in a few seconds. For a model that talks, name another one,\n\
             # such as Qwen/Qwen3-0.6B, and set learning_rate to 2e-4.\n",
        ),
        Model::Directory { path, .. } => (quoted(path), "2e-4", epochs, rows_per_update, ""),
        Model::Hub(id) => (quoted(Path::new(id)), "2e-4", epochs, rows_per_update, ""),
    };
    let (data, eval) = rows_and_evaluation(own_rows);
    let base = about_base(model);
    format!(
        "#:schema ./recipe.schema.json\n\
         \n\
         # A recipe of finetune: what to train, on what, and how.\n\
         #\n\
         #     finetune validate recipe.toml     finds what is wrong, without training\n\
         #     finetune run recipe.toml          trains\n\
         #\n\
         # Editors that know TOML complete and explain keys by the schema. Paths are relative to this file.\n\
         {about}\n\
         output_dir = \"run\"                # the adapter, checkpoints, metrics and report.html go here\n\
         \n\
         [model]\n\
         path = {path}\n\
         {base}\n\
         [lora]\n\
         rank = 16                         # size of the adapter: more can learn more\n\
         alpha = 32                        # the adapter's output is scaled by alpha / rank\n\
         \n\
         [data]\n\
         {data}\n\
         max_seq_len = 512                 # tokens of the longest row; a longer one is an error\n\
         train_on = \"assistant\"            # learn to write the answers, not the questions\n\
         \n\
         [train]\n\
         {steps}\n\
         global_batch_size = {rows_per_update}             # rows per update\n\
         micro_batch_size = 4              # rows at once: less needs less memory\n\
         \n\
         [optimizer]\n\
         learning_rate = {rate}              # larger learns faster, too large learns nothing\n\
         {eval}"
    )
}

/// The line about how many bits the base has.
fn about_base(model: &Model) -> String {
    match model {
        Model::Shipped(_) => String::new(),
        Model::Directory { packed: Some(words), .. } => {
            let words = words.split(';').next().unwrap_or_default();
            format!("# It is packed ({}) and stays so: the adapter is trained over it.\n", words.replace('\n', " "))
        }
        Model::Directory { .. } | Model::Hub(_) => {
            "# quantization = \"nf4\"            # packs a 16-bit base in 4 bits: less than a third of its memory\n"
                .to_owned()
        }
    }
}

/// The lines about the rows, and the table `[eval]`: with rows of their own, users say what is
/// held back.
fn rows_and_evaluation(own_rows: Option<&Path>) -> (String, &'static str) {
    let data = match own_rows {
        Some(path) => format!(
            "train = {}\n# eval = \"held-back.jsonl\"         # rows to measure on, which are not trained on",
            quoted(path)
        ),
        None => "train = \"data/train.jsonl\"        # 40 chats, one JSON object a line\n\
                 eval = \"data/valid.jsonl\"         # 8 others: measured on, not trained on"
            .to_owned(),
    };
    let eval = match own_rows {
        Some(_) => "",
        None => {
            "\n[eval]\n\
             every = 20                        # measures the loss on the held-back rows, every 20 updates\n\
             samples = 2                       # answers of the model before and after, to look at\n\
             exact_match = 8                   # rows answered before and after: how many are exactly right\n"
        }
    };
    (data, eval)
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use finetune_recipe::{Length, Recipe};

    use super::{Model, TRAIN, VALID, text};

    #[test]
    fn every_recipe_that_is_written_is_one() {
        let models = [
            Model::Shipped(PathBuf::from("/a b/\"c\"")),
            Model::Directory { path: PathBuf::from("/m"), packed: None },
            Model::Directory { path: PathBuf::from("/m"), packed: Some("MLX 4-bit, groups of 64; 3 of 9".to_owned()) },
            Model::Hub("a/b".to_owned()),
        ];
        for model in &models {
            for rows in [None, Some(Path::new("/rows.jsonl"))] {
                let text = text(model, rows);
                let recipe = Recipe::parse(&text, Path::new("recipe.toml"), &[], None);
                let recipe = recipe.unwrap_or_else(|error| panic!("{error}\n{text}"));
                assert_eq!(recipe.data.eval.is_empty(), rows.is_some());
                // `validate` warns of fewer than 20 steps.
                let steps = match recipe.train.length {
                    Length::Steps(steps) => steps,
                    Length::Epochs(epochs) => epochs * 40_u64.div_ceil(recipe.train.global_batch_size as u64),
                };
                assert!(rows.is_some() || steps >= 40, "{steps} steps");
                let longest = text.lines().map(|line| line.chars().count()).max();
                assert!(longest <= Some(100), "{longest:?}");
            }
        }
    }

    #[test]
    fn the_rows_are_chats_and_none_is_in_both_files() {
        let rows = |text: &str| text.lines().map(str::to_owned).collect::<Vec<String>>();
        let (train, valid) = (rows(TRAIN), rows(VALID));
        assert_eq!((train.len(), valid.len()), (40, 8));
        assert!(valid.iter().all(|row| !train.contains(row)));
        for row in train.iter().chain(&valid) {
            let row: serde_json::Value = serde_json::from_str(row).expect("JSON");
            assert_eq!(row["messages"][1]["role"], "assistant", "{row}");
        }
    }
}

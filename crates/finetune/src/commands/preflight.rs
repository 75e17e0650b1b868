//! What a host says before a launch: its version, its clock, its disk, and whether the recipe's files are there.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use finetune_cluster::copy::Parcel;
use finetune_dataset::resolve_files;
use finetune_recipe::Recipe;
use finetune_trainer::model_directory;
use serde::{Deserialize, Serialize};

use crate::cli::RunArguments;
use crate::failure::Failure;
use crate::output;

/// Free space on the disk of rank 0 below which a checkpoint is in danger.
const LITTLE_SPACE: u64 = 1 << 30;

/// Clocks further apart make logs hard to compare; the run itself does not depend on them.
const CLOCKS_APART: f64 = 5.0;

/// One JSON object on standard output.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Report {
    version: String,
    /// Seconds since 1970.
    clock: f64,
    /// Bytes free where the run would be written.
    free_bytes: Option<u64>,
    /// Name and digest of each file that all hosts must have alike, "" where it is missing.
    files: Vec<(String, String)>,
}

impl Report {
    pub(crate) fn here(recipe: &Recipe) -> Report {
        let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let hash = |path: &Path| {
            finetune_store::content_hash(path).map_or_else(|_| String::new(), |hash| finetune_store::hex(&hash))
        };
        let mut files = Vec::new();
        match model_directory(recipe) {
            // The weights are compared by the ranks themselves, which have to read them anyway.
            Ok(directory) => files.push(("config.json of model.path".to_owned(), hash(&directory.join("config.json")))),
            Err(_) => files.push((format!("model.path ({})", recipe.model.path), String::new())),
        }
        match resolve_files(&recipe.data.train, &recipe.data.eval) {
            Ok((train, eval)) => {
                let named =
                    |path: &PathBuf| (path.file_name().unwrap_or_default().to_string_lossy().into_owned(), hash(path));
                files.extend(train.iter().chain(&eval).map(named));
            }
            Err(error) => files.push((format!("data ({error})"), String::new())),
        }
        Report {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            clock,
            free_bytes: free_bytes(&recipe.output_dir),
            files,
        }
    }

    pub(crate) fn parse(text: &str) -> Result<Report, String> {
        let line = text.lines().last().unwrap_or_default();
        serde_json::from_str(line)
            .map_err(|_| "its program answers in another way: it must be of this version".to_owned())
    }

    /// What keeps this host from taking part in a run with `other`.
    pub(crate) fn problems(&self, other: &Report) -> Vec<String> {
        let mut problems = Vec::new();
        if self.version != other.version {
            problems.push(format!("its program is version {}, this one {}", self.version, other.version));
        }
        for ((name, hash), (ours, expected)) in self.files.iter().zip(&other.files) {
            match (hash == expected, hash.is_empty()) {
                (true, false) => {}
                (_, true) => problems.push(format!("{name} is missing there")),
                (false, false) => problems.push(format!("{name} is another file than {ours} here")),
            }
        }
        if self.files.len() != other.files.len() {
            problems.push(format!("it has {} files of the recipe, here are {}", self.files.len(), other.files.len()));
        }
        problems
    }

    pub(crate) fn warnings(&self, other: &Report) -> Vec<String> {
        let mut warnings = Vec::new();
        let apart = (self.clock - other.clock).abs();
        if apart > CLOCKS_APART {
            warnings
                .push(format!("its clock is {apart:.0} s apart from this one: times in logs will not fit together"));
        }
        if self.free_bytes.is_some_and(|free| free < LITTLE_SPACE) {
            warnings.push(format!(
                "only {} MiB of disk are free where the run would be written",
                self.free_bytes.unwrap_or(0) >> 20
            ));
        }
        warnings
    }
}

/// Free bytes on the disk of the nearest folder above `path` that exists.
pub(crate) fn free_bytes(path: &Path) -> Option<u64> {
    let folder = path.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("."));
    let status = rustix::fs::statvfs(folder).ok()?;
    Some(status.f_bavail.saturating_mul(status.f_frsize))
}

/// The hidden command.
pub(crate) fn preflight(arguments: &RunArguments) -> Result<ExitCode, Failure> {
    let recipe = Recipe::load(&arguments.recipe.recipe, &arguments.recipe.sets, arguments.output_dir.as_deref())?;
    output::line(&serde_json::to_string(&Report::here(&recipe)).expect("plain data"))?;
    Ok(ExitCode::SUCCESS)
}

/// What asks for it, for the words of a run.
pub(crate) fn words(run: &[String]) -> Vec<String> {
    ["preflight".to_owned()].into_iter().chain(run.iter().cloned()).collect()
}

/// Everything that a run needs, and what it is called in the folder that it is copied to.
pub(crate) fn parcels(run: &RunArguments, recipe: &Recipe) -> Result<Vec<Parcel>, Failure> {
    let program = std::env::current_exe()?;
    let mut parcels = vec![
        Parcel { from: program, to: "finetune".to_owned() },
        Parcel { from: run.recipe.recipe.clone(), to: "recipe.toml".to_owned() },
        Parcel { from: model_directory(recipe)?, to: "model".to_owned() },
    ];
    parcels.extend(moved(recipe).into_iter().flat_map(|(_, files)| files));
    Ok(parcels)
}

/// Keys of the recipe that name files, and where those are in the folder of a copy.
fn moved(recipe: &Recipe) -> Vec<(&'static str, Vec<Parcel>)> {
    let parcels = |what: &str, paths: &[PathBuf]| -> Vec<Parcel> {
        let name = |path: &PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let parcel =
            |(n, path): (usize, &PathBuf)| Parcel { from: path.clone(), to: format!("{what}/{n}/{}", name(path)) };
        paths.iter().enumerate().map(parcel).collect()
    };
    let one = |path: &Option<PathBuf>| path.iter().cloned().collect::<Vec<_>>();
    let keys = [
        ("data.train", parcels("train", &recipe.data.train)),
        ("data.eval", parcels("eval", &recipe.data.eval)),
        ("data.chat_template", parcels("template", &one(&recipe.data.chat_template))),
        ("lora.init_from", parcels("adapter", &one(&recipe.lora.init_from))),
    ];
    keys.into_iter().filter(|(_, parcels)| !parcels.is_empty()).collect()
}

/// The words of the run in the folder of a copy: the same recipe with its files beside it.
pub(crate) fn words_of_copy(run: &RunArguments, recipe: &Recipe) -> Vec<String> {
    let mut words = vec!["recipe.toml".to_owned()];
    let mut set = |text: String| words.extend(["--set".to_owned(), text]);
    let is_moved = |text: &&String| {
        let key = text.split('=').next().unwrap_or_default().trim();
        key == "model.path" || moved(recipe).iter().any(|(name, _)| *name == key)
    };
    run.recipe.sets.iter().filter(|text| !is_moved(text)).for_each(|text| set(text.clone()));
    set("model.path=\"model\"".to_owned());
    for (key, parcels) in moved(recipe) {
        let names: Vec<String> =
            parcels.iter().map(|parcel| serde_json::Value::from(parcel.to.as_str()).to_string()).collect();
        let list = matches!(key, "data.train" | "data.eval");
        set(if list { format!("{key}=[{}]", names.join(", ")) } else { format!("{key}={}", names.join("")) });
    }
    let directory = recipe.output_dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    words.extend(["--output-dir".to_owned(), format!("runs/{directory}")]);
    match &run.resume {
        None => {}
        Some(None) => words.push("--resume".to_owned()),
        Some(Some(path)) => words.push(format!("--resume={}", path.display())),
    }
    words
}

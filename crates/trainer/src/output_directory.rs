//! What a run's output directory holds, whose it is, and where no run may be written.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use finetune_recipe::Recipe;
use finetune_store::{Disk, MANIFEST_NAME, Manifest, StoreError, numbered};

use crate::error::TrainError;
use crate::names::{CHECKPOINTS, COPIES, RECIPE_FILE, RESULTS};

/// The beginning of what [`Recipe::to_toml`] writes. No recipe of a person begins so.
const RESOLVED: &str = "# The recipe as resolved";
/// Bytes of the longest recipe that is looked at.
const LONGEST: u64 = 1 << 20;

/// What is in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Contents {
    /// Nothing, or what a start that saved nothing has left: a run may begin here.
    Free,
    /// A run with checkpoints or a result.
    Run,
    /// Something that no run has written; the name of one such entry.
    Foreign(String),
}

/// The file that a command line means by its recipe. A run directory means the recipe in it.
pub fn recipe_file(argument: &Path) -> PathBuf {
    let inside = argument.join(RECIPE_FILE);
    if argument.is_dir() && inside.is_file() { inside } else { argument.to_owned() }
}

/// The run directory whose resolved recipe this file is. A run that was moved or copied goes on
/// where it lies, not at the place that its recipe names. If the user names no output directory,
/// give this to [`Recipe::load`] as one. `sets`: the texts of `--set`, which may name one.
pub fn home(recipe_file: &Path, sets: &[String]) -> Option<PathBuf> {
    if sets.iter().any(|set| set.split('=').next().is_some_and(|key| key.trim() == "output_dir")) {
        return None;
    }
    let directory = recipe_file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let is_named_so = recipe_file.file_name().is_some_and(|name| name == RECIPE_FILE);
    let has_run = directory.join(CHECKPOINTS).is_dir();
    (is_named_so && has_run && is_resolved(recipe_file)).then(|| directory.to_owned())
}

/// Whether a file is a recipe that a run wrote down.
pub(crate) fn is_resolved(file: &Path) -> bool {
    read(file).is_some_and(|text| text.starts_with(RESOLVED))
}

/// Whether a recipe has words of a person that would be lost if it were written anew.
pub(crate) fn has_own_words(text: &str) -> bool {
    !text.starts_with(RESOLVED) || text.lines().skip(1).any(|line| line.trim_start().starts_with('#'))
}

/// The text of a small file; `None` if it cannot be read.
pub(crate) fn read(file: &Path) -> Option<String> {
    use std::io::Read;
    let mut text = String::new();
    std::fs::File::open(file).ok()?.take(LONGEST).read_to_string(&mut text).ok()?;
    Some(text)
}

/// Whether a run of this program lies here, by files that no other program writes.
fn is_run(disk: &dyn Disk, directory: &Path) -> Result<bool, StoreError> {
    if is_resolved(&directory.join(RECIPE_FILE)) {
        return Ok(true);
    }
    let mut written = Vec::new();
    for folder in [CHECKPOINTS, COPIES].map(|name| directory.join(name)) {
        written.extend(if folder.is_dir() { numbered(disk, &folder, "step-")? } else { Vec::new() });
    }
    Ok(written.iter().any(|(_, path)| kind_of(path).is_some_and(|kind| kind == "checkpoint"))
        || RESULTS.iter().any(|name| kind_of(&directory.join(name)).is_some_and(|kind| kind == *name)))
}

/// The kind that a directory's manifest names. Its files are not looked at.
pub(crate) fn kind_of(directory: &Path) -> Option<String> {
    let path = directory.join(MANIFEST_NAME);
    let bytes = read(&path)?;
    Manifest::parse(&path, bytes.as_bytes()).ok().map(|manifest| manifest.kind)
}

/// Whether a run has left checkpoints or a result here.
pub(crate) fn is_occupied(disk: &dyn Disk, directory: &Path) -> Result<bool, TrainError> {
    let mut has_checkpoints = false;
    // Copies may be all that is left of a run whose host was lost.
    for folder in [CHECKPOINTS, COPIES] {
        let checkpoints = directory.join(folder);
        has_checkpoints |= checkpoints.is_dir() && !numbered(disk, &checkpoints, "step-")?.is_empty();
    }
    Ok(has_checkpoints || RESULTS.iter().any(|name| directory.join(name).is_dir()))
}

/// Why no directory can be made at a path. Without this, `validate` would find nothing in the way of
/// a run that ends at once.
fn no_directory(path: &Path) -> Option<String> {
    // `--output-dir=~/runs` reaches the program as it is written.
    if path.starts_with("~") {
        return Some("begins with ~, which no shell has replaced here: write the whole path".to_owned());
    }
    if let Err(error) = path.metadata()
        && error.kind() == ErrorKind::InvalidFilename
    {
        return Some(format!("cannot be made: {error}"));
    }
    let nearest = path.ancestors().find(|ancestor| ancestor.symlink_metadata().is_ok())?;
    let what = match nearest.metadata() {
        Ok(found) if !found.is_dir() => "a file",
        Err(error) if error.kind() == ErrorKind::NotFound => "a link that leads nowhere",
        _ => return None,
    };
    Some(match nearest == path {
        true => format!("is {what}, and a run needs a directory"),
        false => format!("leads through {}, which is {what}", nearest.display()),
    })
}

/// What is in a directory, which may not exist.
pub(crate) fn contents(disk: &dyn Disk, directory: &Path) -> Result<Contents, TrainError> {
    if let Some(what) = no_directory(directory) {
        return Err(TrainError::WrongFolder { directory: directory.to_owned(), what });
    }
    if !directory.is_dir() {
        return Ok(Contents::Free);
    }
    if is_run(disk, directory)? {
        return Ok(if is_occupied(disk, directory)? { Contents::Run } else { Contents::Free });
    }
    let names = disk
        .list(directory)
        .map_err(|source| TrainError::Store(StoreError::io(directory, finetune_store::Operation::List, 0, source)))?;
    let foreign = names.into_iter().find(|name| !is_ours(disk, directory, name));
    Ok(foreign.map_or(Contents::Free, Contents::Foreign))
}

/// Whether an entry may lie in a directory before a run has written its recipe. Files of the system
/// may (with a leading dot, and what a new file system has), and so may what a start writes first.
fn is_ours(disk: &dyn Disk, directory: &Path, name: &str) -> bool {
    let path = directory.join(name);
    match name {
        "lost+found" => true,
        "metrics.jsonl" => std::fs::metadata(&path).is_ok_and(|file| file.is_file() && file.len() == 0),
        CHECKPOINTS => path.is_dir() && disk.list(&path).is_ok_and(|names| names.iter().all(|name| is_passing(name))),
        name => is_passing(name),
    }
}

/// Whether a name is that of a file that is being written, or hidden.
fn is_passing(name: &str) -> bool {
    name.starts_with('.') || name.contains(".tmp-")
}

/// Where a path leads. Links are followed as far as the path exists.
fn place(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    for ancestor in absolute.ancestors() {
        if let Ok(found) = ancestor.canonicalize() {
            let rest = absolute.strip_prefix(ancestor).unwrap_or(Path::new(""));
            return if rest.as_os_str().is_empty() { found } else { found.join(rest) };
        }
    }
    absolute
}

/// Refuses a place where a run would lie between the user's own files, or be written over them.
/// `file`: the recipe that is read. `model`: the directory of the base model. Both are given as far
/// as they are known.
pub(crate) fn check(
    disk: &dyn Disk,
    recipe: &Recipe,
    file: Option<&Path>,
    model: Option<&Path>,
) -> Result<Contents, TrainError> {
    let directory = &recipe.output_dir;
    let refuse = |what: String| Err(TrainError::WrongFolder { directory: directory.clone(), what });
    let output = place(directory);
    let found = contents(disk, directory)?;
    let has_run = directory.is_dir() && is_run(disk, directory)?;
    if let Some(file) = file {
        let at = place(file);
        if at == output.join(RECIPE_FILE) && !is_resolved(file) {
            return refuse(format!("{} is the recipe itself, and the run would be written over it", file.display()));
        }
        if !has_run && at.parent() == Some(output.as_path()) {
            return refuse(format!("is the folder of the recipe, {}", file.display()));
        }
    }
    if let Some(model) = model {
        let at = place(model);
        if RESULTS.iter().any(|name| at == output.join(name)) {
            return refuse(format!("the base model {} lies where the result of the run goes", model.display()));
        }
        if !has_run && output == at {
            return refuse("is the directory of the base model".to_owned());
        }
        if !has_run && output.starts_with(&at) {
            return refuse(format!("lies in the directory of the base model, {}", model.display()));
        }
    }
    for path in recipe.data.train.iter().chain(&recipe.data.eval) {
        let at = place(path);
        let folder = if path.is_dir() { Some(at.as_path()) } else { at.parent() };
        if !has_run && path.exists() && folder == Some(output.as_path()) {
            return refuse(format!("is the folder of the data, {}", path.display()));
        }
    }
    match found {
        Contents::Foreign(name) => refuse(format!("is not empty and holds no run of finetune: it has `{name}`")),
        found => Ok(found),
    }
}

#[cfg(test)]
mod tests {
    use finetune_store::RealDisk;

    use super::*;

    fn write(path: &Path, text: &str) {
        finetune_store::replace_file(&RealDisk, path, text.as_bytes()).expect("a file in a temporary directory");
    }

    fn recipe(folder: &Path, output: &str) -> Recipe {
        let text = format!("output_dir = {output:?}\n[model]\npath = \"m\"\n[data]\ntrain = \"d/rows.jsonl\"\n");
        Recipe::parse(&text, &folder.join("r.toml"), &[], None).expect("a recipe")
    }

    /// (files of a directory with their text, what the directory holds)
    #[test]
    fn directories_that_a_run_may_and_may_not_take() {
        let resolved = format!("{RESOLVED}, every default written out.\nseed = 1\n");
        let resolved = resolved.as_str();
        let foreign = |name: &str| Contents::Foreign(name.to_owned());
        let cases: [(&[(&str, &str)], Contents); 12] = [
            (&[], Contents::Free),
            (&[(".lock", "12 host"), (".DS_Store", "x")], Contents::Free),
            (&[("checkpoints/.trash-step-000001-0a", ""), ("metrics.jsonl", "")], Contents::Free),
            (&[("recipe.toml.tmp-12-0a0b", "half")], Contents::Free),
            (&[("recipe.toml", resolved), ("metrics.jsonl", "{}")], Contents::Free),
            (&[("recipe.toml", resolved), ("checkpoints/step-000002/x", "")], Contents::Run),
            (&[("recipe.toml", resolved), ("adapter/x", ""), ("slurm.out", "")], Contents::Run),
            (&[("recipe.toml", "seed = 1\n")], foreign("recipe.toml")),
            (&[("metrics.jsonl", "{\"step\": 1}\n")], foreign("metrics.jsonl")),
            (&[("report.html", "<p>")], foreign("report.html")),
            (&[("checkpoints/epoch-1/x", "")], foreign("checkpoints")),
            (&[("adapter/adapter_config.json", "{}")], foreign("adapter")),
        ];
        for (files, want) in cases {
            let folder = tempfile::tempdir().expect("a directory");
            for (name, text) in files {
                write(&folder.path().join(name), text);
            }
            assert_eq!(contents(&RealDisk, folder.path()).expect("readable"), want, "{files:?}");
        }
    }

    /// (output_dir, part of the refusal)
    #[test]
    fn places_of_the_users_own_files() {
        let folder = tempfile::tempdir().expect("a directory");
        for name in ["r.toml", "m/config.json", "d/rows.jsonl", "afile"] {
            write(&folder.path().join(name), "x");
        }
        std::os::unix::fs::symlink("nowhere", folder.path().join("alink")).expect("a link");
        let (file, model) = (folder.path().join("r.toml"), folder.path().join("m"));
        let long = "x".repeat(300);
        for (output, what) in [
            (".", Some("is the folder of the recipe")),
            ("m", Some("is the directory of the base model")),
            ("m/../m", Some("is the directory of the base model")),
            ("m/run", Some("lies in the directory of the base model")),
            ("d", Some("is the folder of the data")),
            ("afile", Some("is a file, and a run needs a directory")),
            ("afile/run", Some("afile, which is a file")),
            ("alink", Some("is a link that leads nowhere")),
            ("alink/run", Some("alink, which is a link that leads nowhere")),
            (long.as_str(), Some("cannot be made: ")),
            ("d/run", None),
            ("runs/first", None),
        ] {
            let checked = check(&RealDisk, &recipe(folder.path(), output), Some(&file), Some(&model));
            match (checked, what) {
                (Ok(_), None) => {}
                (Err(error), Some(what)) => assert!(error.to_string().contains(what), "{output}: {error}"),
                (checked, _) => panic!("{output}: {checked:?}"),
            }
        }
        let mut at_home = recipe(folder.path(), "run");
        at_home.output_dir = "~/run".into();
        let refused = check(&RealDisk, &at_home, Some(&file), Some(&model)).expect_err("no home of anybody");
        assert!(refused.to_string().contains("which no shell has replaced"), "{refused}");
        // The result takes the place of `model/` in the run directory.
        let inner = folder.path().join("runs/full/model");
        write(&inner.join("config.json"), "{}");
        let refused = check(&RealDisk, &recipe(folder.path(), "runs/full"), None, Some(&inner)).expect_err("the base");
        assert!(refused.to_string().contains("lies where the result of the run goes"), "{refused}");
    }

    #[test]
    fn a_run_that_was_copied_is_at_home_where_it_lies() {
        let folder = tempfile::tempdir().expect("a directory");
        let (run, copy) = (folder.path().join("run"), folder.path().join("copy"));
        let text = recipe(folder.path(), "run").to_toml();
        assert!(text.starts_with(RESOLVED), "{text}");
        for directory in [&run, &copy] {
            write(&directory.join("recipe.toml"), &text);
            write(&directory.join("checkpoints/step-000001/x"), "");
            assert_eq!(home(&directory.join("recipe.toml"), &[]), Some(directory.clone()));
            assert_eq!(recipe_file(directory), directory.join("recipe.toml"));
        }
        let elsewhere = ["output_dir=other".to_owned()];
        assert_eq!(home(&run.join("recipe.toml"), &elsewhere), None);
        // A recipe alone, or one of a person beside checkpoints, is no run.
        write(&folder.path().join("recipe.toml"), &text);
        write(&copy.join("recipe.toml"), "seed = 1\n");
        assert_eq!(home(&folder.path().join("recipe.toml"), &[]), None);
        assert_eq!(home(&copy.join("recipe.toml"), &[]), None);
        assert_eq!(recipe_file(&folder.path().join("r.toml")), folder.path().join("r.toml"));
    }

    #[test]
    fn words_of_a_person() {
        for (text, own) in [
            ("seed = 1\n", true),
            ("# The recipe as resolved, every default written out.\nseed = 1\n", false),
            ("# The recipe as resolved, every default written out.\n# 8 was best\nseed = 1\n", true),
        ] {
            assert_eq!(has_own_words(text), own, "{text}");
        }
    }
}

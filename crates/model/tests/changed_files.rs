//! Files of a base that change while a model reads from them: what is written to is refused, and a file that another
//! one takes the name of is read to its end.

#![expect(clippy::disallowed_methods, reason = "a test changes files")]

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use finetune_model::{Model, Placement};
use tempfile::TempDir;

mod golden;

use golden::goldens;

/// A copy of a base that may be changed.
struct Base {
    _folder: TempDir,
    /// What a model is loaded from.
    path: PathBuf,
    weights: PathBuf,
}

impl Base {
    /// `name`: a folder of golden files, and the file of its weights.
    fn copy(&(folder, weights): &(&str, &str)) -> Base {
        let directory = tempfile::tempdir().expect("a folder");
        for name in ["config.json", weights] {
            // A GGUF file has no config.json.
            if let Ok(bytes) = fs::read(goldens().join(folder).join(name)) {
                fs::write(directory.path().join(name), bytes).expect("a copy");
            }
        }
        let weights = directory.path().join(weights);
        let is_gguf = weights.extension().is_some_and(|end| end == "gguf");
        let path = if is_gguf { weights.clone() } else { directory.path().to_owned() };
        // Some systems know times by a few milliseconds only. Nobody changes a model that fast, but tests do.
        let file = OpenOptions::new().write(true).open(&weights).expect("the weights");
        file.set_modified(SystemTime::now() - Duration::from_secs(60)).expect("an earlier time");
        Base { _folder: directory, path, weights }
    }

    fn load(&self, placement: &Placement) -> Model {
        Model::load(&self.path, placement).unwrap_or_else(|error| panic!("{}: {error}", self.path.display()))
    }
}

/// The bits of the logits of three tokens.
fn logits(model: &Model) -> Result<Vec<u32>, String> {
    let logits = model.logits(&[1, 2, 3]).map_err(|error| error.to_string())?;
    Ok(logits.into_iter().map(f32::to_bits).collect())
}

/// All weights others, in a file of the same length with the same header.
fn others(weights: &Path) -> Vec<u8> {
    let mut bytes = fs::read(weights).expect("the weights");
    let half = bytes.len() / 2;
    // The lowest bits: no number becomes one that is not finite.
    bytes[half..].iter_mut().step_by(4).for_each(|byte| *byte ^= 1);
    bytes
}

/// What is done to the file, and what a pass says of it. `None`: it has the bits of before.
type Change = (&'static str, fn(&Path), Option<&'static str>);

const CHANGES: [Change; 5] = [
    (
        "written over",
        |weights| fs::write(weights, others(weights)).expect("bytes"),
        Some("its time of modification is another"),
    ),
    (
        "cut",
        |weights| OpenOptions::new().write(true).open(weights).expect("the file").set_len(4096).expect("a cut"),
        Some("and has 4096 now"),
    ),
    (
        "longer",
        |weights| {
            let file = OpenOptions::new().write(true).open(weights).expect("the file");
            let length = file.metadata().expect("the file").len();
            file.set_len(length + 1).expect("a longer file");
        },
        Some("bytes, and has"),
    ),
    // As downloads and editors do it: the model has the file that it was loaded from.
    (
        "replaced by a renamed file",
        |weights| {
            let beside = weights.with_extension("new");
            fs::write(&beside, others(weights)).expect("bytes");
            fs::rename(beside, weights).expect("a name");
        },
        None,
    ),
    ("removed", |weights| fs::remove_file(weights).expect("the file"), None),
];

/// Layers from the disk, in files of all kinds; and the table of Gemma 4 that stays in its file when the layers are in
/// memory. The matrices of the quickstart's base are large enough to be read past the system's cache.
#[test]
fn what_is_written_to_while_it_is_read_is_refused() {
    let disk = |memory| Placement::cpu(None).with_layers_from_disk(true).with_host_memory(memory);
    let quickstart = ("../../datasets/quickstart/base", "model.safetensors");
    let cases = [
        (quickstart, disk(None)),
        (quickstart, disk(Some(0))),
        (("packed/gguf_k", "model.gguf"), disk(None)),
        (("packed/mlx4", "model.safetensors"), disk(None)),
        (("models/gpt_oss_mxfp4", "model.safetensors"), disk(None)),
        (("packed/int4_kimi_k2", "model.safetensors"), disk(None).with_experts_from_disk(true)),
        (("models/gemma4", "model.safetensors"), Placement::cpu(None)),
    ];
    for (files, placement) in cases {
        for (change, make, want) in &CHANGES {
            let base = Base::copy(&files);
            let before = logits(&base.load(&placement)).expect("the logits of before");
            let model = base.load(&placement);
            make(&base.weights);
            let name = files.0;
            match (logits(&model), want) {
                (Ok(after), None) => assert!(after == before, "{name}, {change}: other bits"),
                (Err(error), Some(want)) => {
                    let file = base.weights.display().to_string();
                    assert!(error.contains(&file) && error.contains(want), "{name}, {change}: {error}");
                }
                (found, _) => panic!("{name}, {change}: {found:?}"),
            }
        }
    }
}

/// With all weights in memory no file is needed any more.
#[test]
fn what_was_loaded_may_change() {
    for (change, make, _) in &CHANGES {
        let base = Base::copy(&("models/qwen3", "model.safetensors"));
        let model = base.load(&Placement::cpu(None));
        let before = logits(&model).expect("the logits of before");
        make(&base.weights);
        assert!(logits(&model).expect("logits") == before, "{change}");
    }
}

/// A run knows its base by a digest, which is made of what has the files' names then.
#[test]
fn files_that_are_no_longer_in_place_are_known() {
    let base = Base::copy(&("models/qwen3", "model.safetensors"));
    base.load(&Placement::cpu(None)).expect_files_in_place().expect("the same file");
    for (change, make, _) in &CHANGES {
        let base = Base::copy(&("models/qwen3", "model.safetensors"));
        let model = base.load(&Placement::cpu(None));
        make(&base.weights);
        let error = model.expect_files_in_place().expect_err(change).to_string();
        assert!(error.contains("model.safetensors"), "{change}: {error}");
    }
}

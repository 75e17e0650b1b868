//! TensorBoard's event files of a run. `scripts/check_tensorboard.py` reads them with TensorBoard
//! itself; here they are read as TensorBoard reads them, by a few lines.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::folder::{CRASH_RECIPE, Folder, metrics};

/// Values by tag and step, of all files in the order of their names. An event that says that a
/// process has begun voids what is there from its step on.
fn scalars(folder: &Path) -> BTreeMap<(String, u64), Vec<f32>> {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("a file").path()).collect();
    files.sort();
    let mut found: BTreeMap<(String, u64), Vec<f32>> = BTreeMap::new();
    for file in files {
        let bytes = std::fs::read(&file).expect("a file");
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().expect("a length")) as usize;
            let (step, begins, values) = event(&rest[12..12 + length]);
            rest = &rest[16 + length..];
            if begins {
                found.retain(|(_, known), _| *known < step);
            }
            for (tag, value) in values {
                found.entry((tag, step)).or_default().push(value);
            }
        }
    }
    found
}

/// Step, whether a process begins, and scalars of an event.
fn event(bytes: &[u8]) -> (u64, bool, Vec<(String, f32)>) {
    let (mut step, mut begins, mut values) = (0, false, Vec::new());
    for (number, field) in fields(bytes) {
        match (number, field) {
            (2, Field::Number(number)) => step = number,
            (7, Field::Bytes(_)) => begins = true,
            (5, Field::Bytes(summary)) => {
                for (_, value) in fields(summary) {
                    let Field::Bytes(value) = value else { continue };
                    let (mut tag, mut number) = (String::new(), None);
                    for field in fields(value) {
                        match field {
                            (1, Field::Bytes(text)) => tag = String::from_utf8_lossy(text).into_owned(),
                            (2, Field::Float(value)) => number = Some(value),
                            _ => {}
                        }
                    }
                    values.extend(number.map(|number| (tag, number)));
                }
            }
            _ => {}
        }
    }
    (step, begins, values)
}

enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    Float(f32),
}

fn fields(mut bytes: &[u8]) -> Vec<(u64, Field<'_>)> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let key = number(&mut bytes);
        let field = match key & 7 {
            0 => Field::Number(number(&mut bytes)),
            1 => Field::Bytes(take(&mut bytes, 8)),
            2 => {
                let length = number(&mut bytes) as usize;
                Field::Bytes(take(&mut bytes, length))
            }
            _ => Field::Float(f32::from_le_bytes(take(&mut bytes, 4).try_into().expect("four bytes"))),
        };
        found.push((key >> 3, field));
    }
    found
}

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> &'a [u8] {
    let (taken, rest) = bytes.split_at(count);
    *bytes = rest;
    taken
}

fn number(bytes: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..).step_by(7) {
        let byte = take(bytes, 1)[0];
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            break;
        }
    }
    value
}

/// The rows of metrics.jsonl as scalars.
fn expected(run: &Path) -> BTreeMap<(String, u64), Vec<f32>> {
    let tags = [
        ("loss", "train/loss"),
        ("learning_rate", "train/learning_rate"),
        ("grad_norm", "train/grad_norm"),
        ("tokens_per_second", "train/tokens_per_second"),
        ("epoch", "train/epoch"),
        ("eval_loss", "eval/loss"),
    ];
    let mut all = BTreeMap::new();
    for row in metrics(run) {
        let step = row["step"].as_u64().expect("a step");
        for (key, tag) in tags {
            if let Some(value) = row[key].as_f64() {
                all.insert((tag.to_owned(), step), vec![value as f32]);
            }
        }
    }
    all
}

#[test]
fn event_files_have_the_metrics_once_whatever_interrupts_the_run() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let set = ["--set", "log.tensorboard=true"];
    let resume = [&set[..], &["--resume"]].concat();
    // After a step, after an evaluation, while a checkpoint is written.
    for (n, failpoint) in ["train.updated:6", "train.evaluated:4", "checkpoint.file:9"].iter().enumerate() {
        let name = format!("run-{n}");
        assert!(folder.run_killed_at(&name, &set, failpoint), "{failpoint}");
        folder.run(&name, &resume).expect(0);
        let events = folder.path(&name).join("tensorboard");
        assert!(std::fs::read_dir(&events).expect("a folder").count() >= 2, "each process has a file");
        assert_eq!(scalars(&events), expected(&folder.path(&name)), "{failpoint}");
    }
    // The files change nothing else, and are asked for later too.
    folder.run("plain", &[]).expect(0);
    folder.result("run-0").expect_same(&folder.result("plain"), "with event files");
    folder.run("plain", &["--resume", "--set", "log.tensorboard=elsewhere", "--set", "train.max_steps=12"]).expect(0);
    assert_eq!(scalars(&folder.path("elsewhere/plain")), expected(&folder.path("plain")));
}

#[test]
fn a_folder_that_cannot_be_written_to_is_refused_before_training() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.write("taken", b"a file");
    let ended = folder.run("run", &["--set", "log.tensorboard=taken"]);
    assert!(ended.code.is_some_and(|code| code == 2 || code == 5), "{ended:?}");
    assert!(ended.stderr.contains("taken") && !ended.stderr.contains("training steps"), "{}", ended.stderr);
}

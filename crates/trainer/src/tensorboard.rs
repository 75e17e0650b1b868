//! TensorBoard's event files (`[log] tensorboard`), which other trackers read too.
//!
//! A file is a list of records: the length, a checksum of the length, the bytes, a checksum of the
//! bytes (<https://www.tensorflow.org/tutorials/load_data/tfrecord>). The bytes of each are an
//! `Event` in protobuf's encoding. The fields that are written here, with their numbers, are from
//! event.proto, summary.proto and tensor.proto of
//! <https://github.com/tensorflow/tensorboard/tree/master/tensorboard/compat/proto>.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use finetune_store::{Operation, RealDisk, StoreError, replace_file};

use crate::metrics::{Row, StepRow};
use crate::run_facts::now;

/// What the name of every file begins with. TensorBoard looks for "tfevents", and reads the files
/// of a folder in the order of their names.
const PREFIX: &str = "events.out.tfevents.";

/// The version of the format, in the first record of each file.
const VERSION: &str = "brain.Event:2";

/// An event file, open for appending.
#[derive(Debug)]
pub(crate) struct EventFile {
    path: PathBuf,
    file: std::fs::File,
}

impl EventFile {
    /// Begins the file of a run that goes on from `step`. `rows`: the metrics up to there.
    /// `evaluation_due`: the evaluation of this step will be made again.
    ///
    /// What older files of the folder hold from `step` on is declared void, and the rows of `step`
    /// are written again. If there is no older file, all rows are written.
    pub(crate) fn open(
        folder: &Path,
        recipe: &str,
        rows: &[Row],
        step: u64,
        evaluation_due: bool,
    ) -> Result<EventFile, StoreError> {
        let newest = newest(folder);
        let from = if newest.is_some() { step } else { 0 };
        let second = newest.map_or(now(), |newest| now().max(newest.saturating_add(1)));
        let path = folder.join(format!("{PREFIX}{second}.finetune"));
        let time = wall_time();
        let mut bytes = record(&event(time, 0, &[text(3, VERSION)]));
        bytes.extend(record(&event(time, from, &[message(7, &[varint(1, 1)])])));
        // Markdown of TensorBoard's text page: a block of code is indented by four spaces.
        let code: String = recipe.lines().map(|line| format!("    {line}\n")).collect();
        bytes.extend(record(&event(time, from, &[summary(&[text_value("recipe/text_summary", &code)])])));
        let repeated = rows.iter().filter(|row| row.step() >= from);
        let kept = repeated.filter(|row| !(evaluation_due && row.step() == step && matches!(row, Row::Eval(_))));
        bytes.extend(kept.flat_map(|row| record(&event_of(time, row))));
        replace_file(&RealDisk, &path, &bytes)?;
        let file = std::fs::OpenOptions::new().append(true).open(&path);
        let file = file.map_err(|source| StoreError::io(&path, Operation::Write, 0, source))?;
        Ok(EventFile { path, file })
    }

    /// Appends a row of the metrics in one write.
    pub(crate) fn append(&mut self, row: &Row) -> Result<(), StoreError> {
        let bytes = record(&event_of(wall_time(), row));
        let written = self.file.write_all(&bytes);
        written.map_err(|source| StoreError::io(&self.path, Operation::Write, bytes.len() as u64, source))
    }

    /// Syncs the rows so far, as the metrics do.
    pub(crate) fn sync(&self) -> Result<(), StoreError> {
        self.file.sync_all().map_err(|source| StoreError::io(&self.path, Operation::Sync, 0, source))
    }
}

/// The second in the name of the newest file of a folder.
fn newest(folder: &Path) -> Option<u64> {
    let entries = std::fs::read_dir(folder).ok()?.flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter_map(|name| name.strip_prefix(PREFIX)?.split('.').next()?.parse().ok()).max()
}

/// Seconds since 1970.
fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// The event of a row of the metrics.
fn event_of(time: f64, row: &Row) -> Vec<u8> {
    let values = match row {
        Row::Step(row) => values_of(row),
        Row::Eval(row) => vec![scalar("eval/loss", row.eval_loss)],
    };
    event(time, row.step(), &[summary(&values)])
}

fn values_of(row: &StepRow) -> Vec<Vec<u8>> {
    let numbers = [
        ("train/loss", row.loss),
        ("train/learning_rate", row.learning_rate),
        ("train/grad_norm", row.grad_norm),
        ("train/tokens_per_second", row.tokens_per_second),
        ("train/epoch", row.epoch),
    ];
    let own = row.objective.iter().map(|(name, number)| scalar(&format!("train/{name}"), *number));
    numbers.iter().map(|(tag, number)| scalar(tag, *number)).chain(own).collect()
}

/// `Event`: `wall_time` (1), `step` (2) and one of `file_version` (3), `summary` (5),
/// `session_log` (7).
fn event(time: f64, step: u64, what: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = vec![0x09];
    bytes.extend(time.to_le_bytes());
    // A field with its default is left out.
    if step > 0 {
        bytes.extend(varint(2, step));
    }
    bytes.extend(what.concat());
    bytes
}

/// `Event.summary` (5) with `Summary.value` (1) for each value.
fn summary(values: &[Vec<u8>]) -> Vec<u8> {
    let values: Vec<Vec<u8>> = values.iter().map(|value| field(1, value)).collect();
    message(5, &values)
}

/// `Summary.Value`: `tag` (1) and `simple_value` (2), a float.
fn scalar(tag: &str, number: f64) -> Vec<u8> {
    let mut bytes = text(1, tag);
    bytes.push(2 << 3 | 5);
    bytes.extend((number as f32).to_le_bytes());
    bytes
}

/// `Summary.Value`: `tag` (1), `tensor` (8) and `metadata` (9), which names the plugin that shows
/// it.
fn text_value(tag: &str, words: &str) -> Vec<u8> {
    // `TensorProto`: `dtype` (1, 7 is a string), `tensor_shape` (2) with one `dim` (2) of `size` (1)
    // one, `string_val` (8).
    let shape = message(2, &[message(2, &[varint(1, 1)])]);
    let tensor = message(8, &[varint(1, 7), shape, text(8, words)]);
    // `SummaryMetadata`: `plugin_data` (1) with `plugin_name` (1).
    let metadata = message(9, &[message(1, &[text(1, "text")])]);
    [text(1, tag), tensor, metadata].concat()
}

/// A field with a length: a message made of fields.
fn message(number: u64, fields: &[Vec<u8>]) -> Vec<u8> {
    field(number, &fields.concat())
}

fn text(number: u64, words: &str) -> Vec<u8> {
    field(number, words.as_bytes())
}

fn field(number: u64, content: &[u8]) -> Vec<u8> {
    let mut bytes = base_128(number << 3 | 2);
    bytes.extend(base_128(content.len() as u64));
    bytes.extend(content);
    bytes
}

fn varint(number: u64, value: u64) -> Vec<u8> {
    [base_128(number << 3), base_128(value)].concat()
}

/// Protobuf's integers: seven bits in each byte, the lowest first.
fn base_128(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

/// A record of the file.
fn record(content: &[u8]) -> Vec<u8> {
    let length = (content.len() as u64).to_le_bytes();
    let checksum = |bytes: &[u8]| masked_crc(bytes).to_le_bytes();
    [&length[..], &checksum(&length), content, &checksum(content)].concat()
}

/// CRC-32C, rotated and shifted so that a checksum of bytes with checksums in them is none of its
/// own (the same page).
fn masked_crc(bytes: &[u8]) -> u32 {
    let crc = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32;
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// What the `RecordWriter` of TensorBoard 2.21 writes for the same events.
    #[test]
    fn records_are_those_of_tensorboard() {
        let scalars = [scalar("train/loss", 0.25), scalar("train/grad_norm", -1.0)];
        for (event, want) in [
            (
                event(1.5, 0, &[text(3, VERSION)]),
                "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c",
            ),
            (
                event(1.5, 300, &[message(7, &[varint(1, 1)])]),
                "100000000000000095fbfe1809000000000000f83f10ac023a020801713b788a",
            ),
            (
                event(1.5, 300, &[summary(&scalars)]),
                "39000000000000008b0737f109000000000000f83f10ac022a2b0a110a0a747261696e2f6c6f7373150000803e0a160a0f\
                 747261696e2f677261645f6e6f726d15000080bfa478a78d",
            ),
            (
                event(1.5, 0, &[summary(&[text_value("recipe/text_summary", "hi")])]),
                "3a000000000000001295eae209000000000000f83f2a2f0a2d0a137265636970652f746578745f73756d6d617279420c08\
                 07120412020801420268694a080a060a04746578742195052a",
            ),
        ] {
            assert_eq!(hex(&record(&event)), want);
        }
    }

    fn rows(text: &str) -> Vec<Row> {
        text.lines().map(|line| serde_json::from_str(line).expect("a row")).collect()
    }

    /// The contents of the records of a file, whose checksums must be right.
    fn contents(path: &Path) -> Vec<Vec<u8>> {
        let bytes = std::fs::read(path).expect("a file");
        let (mut rest, mut found) = (bytes.as_slice(), Vec::new());
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().expect("eight bytes")) as usize;
            assert_eq!(rest[..12 + length + 4], record(&rest[12..12 + length]));
            found.push(rest[12..12 + length].to_vec());
            rest = &rest[16 + length..];
        }
        found
    }

    fn files(folder: &Path) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("a file").path());
        let mut files: Vec<PathBuf> = entries.collect();
        files.sort();
        files
    }

    #[test]
    fn a_resume_begins_a_later_file_that_voids_what_it_repeats() {
        let folder = tempfile::tempdir().expect("a directory");
        let folder = folder.path().join("tensorboard");
        let eval = |step: u64| format!("{{\"step\":{step},\"eval_loss\":2.0,\"eval_tokens\":1}}\n");
        let all = rows(&[eval(0), eval(2), eval(3)].concat());
        let mut first = EventFile::open(&folder, "seed = 1\n", &[], 0, false).expect("a file");
        all.iter().for_each(|row| first.append(row).expect("written"));
        // Version, beginning, recipe, three rows.
        assert_eq!(contents(&files(&folder)[0]).len(), 6);
        // Killed and resumed within the second: the name is a later one all the same.
        for (due, repeated) in [(false, 1), (true, 0)] {
            EventFile::open(&folder, "seed = 1\n", &all[..2], 2, due).expect("a file");
            let events = contents(files(&folder).last().expect("a file"));
            assert_eq!(events.len(), 3 + repeated, "due: {due}");
            assert!(events[1].ends_with(&[2 << 3, 2, 0x3a, 2, 8, 1]), "begins at step 2: {:?}", events[1]);
        }
        assert_eq!(files(&folder).len(), 3);
        // Files that were asked for later get what there was.
        let other = folder.join("other");
        EventFile::open(&other, "", &all, 3, false).expect("a file");
        assert_eq!(contents(&files(&other)[0]).len(), 6);
    }
}

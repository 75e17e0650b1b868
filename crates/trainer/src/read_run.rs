//! A run as it is seen from outside, while it goes on or later: `watch` and `compare`.
//!
//! Nothing here takes the run's lock or changes a file. The bytes may come from this disk or over
//! ssh, in any pieces.

use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use finetune_recipe::{Length, Recipe};
use finetune_store::{RealDisk, RunLock, numbered};

use crate::metrics::{self, EvalRow, Row, StepRow};
use crate::names::{CHECKPOINTS, RECIPE_FILE, RESULTS};
use crate::numbers::counted;
use crate::run_facts::{self, RunFacts, RunStatus};
use crate::samples::{Answers, BeforeAfter, SAMPLES_FILE};

/// Bytes of the metrics that are read at a time.
const PIECE: u64 = 4 << 20;

/// Longer lines are no rows. A row of a thousand ranks has 200 KB.
const LONGEST_LINE: usize = 4 << 20;

/// The last steps whose median time an estimate goes by.
const RECENT: usize = 9;

/// Whether a run goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// Nothing is there yet.
    Waiting,
    /// A process works on it.
    Running,
    /// It has come to its end.
    Done,
    /// A signal has stopped it, and its last step is saved.
    Stopped,
    /// An error has ended it.
    Failed,
    /// Its process is gone without a word: it was killed, or its host went down.
    BrokenOff,
}

impl RunState {
    /// The state in a word or two.
    pub fn words(self) -> &'static str {
        match self {
            RunState::Waiting => "waiting",
            RunState::Running => "running",
            RunState::Done => "done",
            RunState::Stopped => "stopped",
            RunState::Failed => "failed",
            RunState::BrokenOff => "broken off",
        }
    }

    /// Whether no more rows will come, unless someone resumes it.
    pub fn is_over(self) -> bool {
        !matches!(self, RunState::Waiting | RunState::Running)
    }
}

/// What is known of a run.
#[derive(Debug, Default)]
pub struct RunRecord {
    steps: Vec<StepRow>,
    evals: Vec<EvalRow>,
    /// The beginning of a line whose end has not come.
    torn: Vec<u8>,
    /// Lines that are no rows.
    damaged: u64,
    /// What the run says of itself; `None` if a version wrote it that said nothing.
    pub facts: Option<RunFacts>,
    /// Its recipe; `None` if there is none, or this version cannot read it.
    pub recipe: Option<Recipe>,
    answers: BeforeAfter,
    /// The step of its newest checkpoint.
    pub checkpoint: Option<u64>,
    /// Whether a process works on it.
    pub is_held: bool,
    /// Whether it has written a result.
    pub has_result: bool,
}

impl RunRecord {
    /// Rows of steps, in order.
    pub fn steps(&self) -> &[StepRow] {
        &self.steps
    }

    /// Rows of evaluations, in order.
    pub fn evals(&self) -> &[EvalRow] {
        &self.evals
    }

    /// The number of lines that are no rows.
    pub fn damaged(&self) -> u64 {
        self.damaged
    }

    /// What is said of them; `None` if there are none.
    pub fn damage(&self) -> Option<String> {
        let lines = counted(self.damaged, "line");
        (self.damaged > 0).then(|| format!("{lines} of metrics.jsonl cannot be read: left out"))
    }

    /// Answers to held-back rows: before training, and after it.
    pub fn answers(&self) -> (Option<&Answers>, Option<&Answers>) {
        (self.answers.before.as_ref(), self.answers.after.as_ref())
    }

    /// Takes the answers from the bytes of a `samples.json`.
    pub fn take_answers(&mut self, bytes: &[u8]) {
        self.answers = serde_json::from_slice(bytes).unwrap_or_default();
    }

    /// Takes the next bytes of the metrics.
    pub fn push(&mut self, bytes: &[u8]) {
        self.torn.extend_from_slice(bytes);
        let Some(end) = self.torn.iter().rposition(|&byte| byte == b'\n') else {
            if self.torn.len() > LONGEST_LINE {
                self.torn.clear();
            }
            return;
        };
        let rest = self.torn.split_off(end + 1);
        let lines = std::mem::replace(&mut self.torn, rest);
        for line in lines.split(|&byte| byte == b'\n').filter(|line| !line.trim_ascii().is_empty()) {
            match serde_json::from_slice::<Row>(line) {
                Ok(row) => self.add(row),
                Err(_) => self.damaged += 1,
            }
        }
    }

    /// Adds a row. If its step has been there, the run was resumed from a step before it, and the
    /// later rows are those of a course that was given up.
    fn add(&mut self, row: Row) {
        match row {
            Row::Step(mut row) => {
                self.steps.truncate(self.steps.partition_point(|known| known.step < row.step));
                self.evals.truncate(self.evals.partition_point(|known| known.step < row.step));
                // The numbers of each rank take far more memory than the rest, and are not shown.
                row.ranks = Vec::new();
                self.steps.push(row);
            }
            Row::Eval(row) => {
                self.steps.truncate(self.steps.partition_point(|known| known.step <= row.step));
                self.evals.truncate(self.evals.partition_point(|known| known.step < row.step));
                self.evals.push(row);
            }
        }
    }

    /// Forgets all rows: the file of the metrics is another one now.
    pub fn begin_again(&mut self) {
        self.steps.clear();
        self.evals.clear();
        self.torn.clear();
        self.damaged = 0;
    }

    /// Takes the rows of another record instead of its own.
    pub fn take_rows(&mut self, other: RunRecord) {
        let RunRecord { steps, evals, torn, damaged, .. } = other;
        (self.steps, self.evals, self.torn, self.damaged) = (steps, evals, torn, damaged);
    }

    /// Whether it goes on.
    pub fn state(&self) -> RunState {
        if self.is_held {
            return RunState::Running;
        }
        match self.facts.as_ref().map(|facts| facts.status) {
            Some(RunStatus::Done) => RunState::Done,
            Some(RunStatus::Stopped) => RunState::Stopped,
            Some(RunStatus::Failed) => RunState::Failed,
            Some(RunStatus::Running) => RunState::BrokenOff,
            None if self.has_result => RunState::Done,
            None if self.steps.is_empty() && self.evals.is_empty() => RunState::Waiting,
            None => RunState::Stopped,
        }
    }

    /// The last step that is done, 0 before the first.
    pub fn step(&self) -> u64 {
        self.steps.last().map_or(0, |row| row.step)
    }

    /// Steps of the whole run, if they are known.
    pub fn total_steps(&self) -> Option<u64> {
        if let Some(facts) = self.facts.as_ref().filter(|facts| facts.steps > 0) {
            return Some(facts.steps);
        }
        match self.recipe.as_ref()?.train.length {
            Length::Steps(steps) => Some(steps),
            Length::Epochs(epochs) => {
                let row = self.steps.last().filter(|row| row.epoch > 0.0)?;
                Some((row.step as f64 / row.epoch * epochs as f64).round() as u64)
            }
        }
    }

    /// Seconds that the steps left will take, by the last steps.
    pub fn seconds_left(&self) -> Option<f64> {
        let left = self.total_steps()?.checked_sub(self.step())?;
        let recent = &self.steps[self.steps.len().saturating_sub(RECENT)..];
        let mut seconds: Vec<f64> = recent.iter().map(|row| row.seconds).collect();
        seconds.sort_by(f64::total_cmp);
        Some(seconds.get(seconds.len() / 2)? * left as f64)
    }

    /// Seconds of all steps.
    pub fn seconds(&self) -> f64 {
        // The sum of nothing is -0.
        self.steps.iter().map(|row| row.seconds).sum::<f64>() + 0.0
    }

    /// The best evaluation after the first step.
    pub fn best_evaluation(&self) -> Option<&EvalRow> {
        let after = self.evals.iter().filter(|row| row.step > 0 && row.eval_loss.is_finite());
        after.min_by(|one, other| one.eval_loss.total_cmp(&other.eval_loss))
    }
}

/// A run in a directory of this machine.
#[derive(Debug)]
pub struct LocalRun {
    directory: PathBuf,
    /// Bytes of the metrics that were read.
    offset: u64,
    /// Device and number of the file that they were read from.
    file: Option<(u64, u64)>,
    /// What is known of the run.
    pub record: RunRecord,
}

impl LocalRun {
    /// A run of which nothing is known yet.
    pub fn new(directory: &Path) -> LocalRun {
        LocalRun { directory: directory.to_owned(), offset: 0, file: None, record: RunRecord::default() }
    }

    /// Where it lies.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Reads what is new.
    ///
    /// # Errors
    /// The metrics are there and cannot be read.
    pub fn look(&mut self) -> std::io::Result<()> {
        // In this order: a run that lets go of its lock has said its last word, and a run that has
        // said it has written all its rows.
        self.record.is_held = RunLock::holder(&self.directory).is_some();
        if let Some(facts) = RunFacts::read(&self.directory) {
            self.record.facts = Some(facts);
        }
        let steps = numbered(&RealDisk, &self.directory.join(CHECKPOINTS), "step-").unwrap_or_default();
        self.record.checkpoint = steps.last().map(|(step, _)| *step);
        self.record.has_result = RESULTS.iter().any(|name| self.directory.join(name).is_dir());
        self.read_metrics()?;
        if self.record.recipe.is_none() {
            self.record.recipe = Recipe::load(&self.directory.join(RECIPE_FILE), &[], Some(&self.directory)).ok();
        }
        if let Ok(bytes) = std::fs::read(self.directory.join(SAMPLES_FILE)) {
            self.record.take_answers(&bytes);
        }
        // It may have let go meanwhile. If it has just begun again, it is still held.
        if self.record.is_held && self.record.facts.as_ref().is_some_and(|facts| facts.status != RunStatus::Running) {
            self.record.is_held = RunLock::holder(&self.directory).is_some();
        }
        Ok(())
    }

    fn read_metrics(&mut self) -> std::io::Result<()> {
        let mut file = match std::fs::File::open(self.directory.join(metrics::FILE)) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        let found = file.metadata()?;
        let identity = Some((found.dev(), found.ino()));
        // A resume writes the file anew and gives it the name of the old one.
        if self.file != identity || found.len() < self.offset {
            self.record.begin_again();
            (self.offset, self.file) = (0, identity);
        }
        file.seek(SeekFrom::Start(self.offset))?;
        loop {
            let mut bytes = Vec::new();
            let count = (&mut file).take(PIECE).read_to_end(&mut bytes)? as u64;
            if count == 0 {
                return Ok(());
            }
            self.offset += count;
            self.record.push(&bytes);
        }
    }
}

/// The names of the files in a run directory that [`RunRecord`] is made of: metrics, facts, recipe
/// and answers.
pub const RECORD_FILES: [&str; 4] = [metrics::FILE, run_facts::FILE, RECIPE_FILE, SAMPLES_FILE];

#[cfg(test)]
mod tests {
    use finetune_store::replace_file;

    use super::*;

    fn step(step: u64, loss: f64) -> String {
        let row = StepRow { step, epoch: step as f64 / 4.0, loss, seconds: 2.0, ..StepRow::default() };
        serde_json::to_string(&row).expect("JSON") + "\n"
    }

    fn eval(step: u64) -> String {
        format!("{{\"step\":{step},\"eval_loss\":{},\"eval_tokens\":1}}\n", 3.0 - step as f64 / 10.0)
    }

    fn numbers(record: &RunRecord) -> (Vec<u64>, Vec<u64>) {
        let steps = record.steps().iter().map(|row| row.step).collect();
        (steps, record.evals().iter().map(|row| row.step).collect())
    }

    /// (pieces of the file, steps, evaluations, damaged lines)
    #[test]
    fn rows_come_in_any_pieces() {
        let [one, two, three] = [step(1, 3.0), step(2, 2.0), step(3, 1.0)];
        let [before, second, third] = [eval(0), eval(2), eval(3)];
        let (begin, end) = two.split_at(20);
        type Numbers = (Vec<u64>, Vec<u64>);
        let cases: [(Vec<&str>, Numbers, u64); 7] = [
            (vec![&one, &two], (vec![1, 2], vec![]), 0),
            (vec![&one, begin], (vec![1], vec![]), 0),
            (vec![&one, begin, end, &three], (vec![1, 2, 3], vec![]), 0),
            (vec![&one, "{torn}\n\n", &two], (vec![1, 2], vec![]), 1),
            (vec![&before, &one, &two, &second], (vec![1, 2], vec![0, 2]), 0),
            // `tail -F` follows a file that a resume has written anew.
            (vec![&before, &one, &two, &three, &third, &before, &one, &two], (vec![1, 2], vec![0]), 0),
            // A resume from step 2, whose evaluation is made again.
            (vec![&one, &two, &second, &three, &second], (vec![1, 2], vec![2]), 0),
        ];
        for (pieces, want, damaged) in cases {
            let mut record = RunRecord::default();
            pieces.iter().for_each(|piece| record.push(piece.as_bytes()));
            assert_eq!((numbers(&record), record.damaged()), (want, damaged), "{pieces:?}");
        }
    }

    #[test]
    fn a_growing_file_is_followed_and_a_new_one_read_from_its_beginning() {
        let folder = tempfile::tempdir().expect("a directory");
        let path = folder.path().join(metrics::FILE);
        let mut run = LocalRun::new(folder.path());
        run.look().expect("nothing there");
        assert_eq!(run.record.state(), RunState::Waiting);
        replace_file(&RealDisk, &path, step(1, 3.0).as_bytes()).expect("a file");
        run.look().expect("one row");
        let mut file = std::fs::OpenOptions::new().append(true).open(&path).expect("a file");
        std::io::Write::write_all(&mut file, (step(2, 2.0) + "{\"st").as_bytes()).expect("written");
        run.look().expect("two rows and a piece");
        assert_eq!(numbers(&run.record).0, [1, 2]);
        // A resume from step 1.
        replace_file(&RealDisk, &path, step(1, 3.5).as_bytes()).expect("a file");
        run.look().expect("one row");
        assert_eq!((numbers(&run.record).0, run.record.steps()[0].loss), (vec![1], 3.5));
    }

    #[test]
    fn the_state_is_what_lock_and_facts_say() {
        let facts = |status| Some(RunFacts { status, ..RunFacts::default() });
        for (is_held, facts, has_result, want) in [
            (true, facts(RunStatus::Running), false, RunState::Running),
            // A resume of a run that was done.
            (true, facts(RunStatus::Done), true, RunState::Running),
            (false, facts(RunStatus::Running), false, RunState::BrokenOff),
            (false, facts(RunStatus::Done), true, RunState::Done),
            (false, facts(RunStatus::Failed), true, RunState::Failed),
            (false, facts(RunStatus::Stopped), false, RunState::Stopped),
            (false, None, true, RunState::Done),
            (false, None, false, RunState::Waiting),
        ] {
            let record = RunRecord { is_held, facts: facts.clone(), has_result, ..RunRecord::default() };
            assert_eq!(record.state(), want, "{is_held} {facts:?} {has_result}");
        }
    }

    #[test]
    fn what_is_left_is_counted_by_the_last_steps() {
        let mut record = RunRecord::default();
        record.push([step(1, 3.0), step(2, 2.0)].concat().as_bytes());
        assert_eq!((record.total_steps(), record.seconds_left()), (None, None));
        // Four steps make an epoch.
        let recipe = "[model]\npath = \"m\"\n[data]\ntrain = \"t.jsonl\"\n[train]\nepochs = 3\n";
        record.recipe = Some(Recipe::parse(recipe, Path::new("r.toml"), &[], None).expect("a recipe"));
        assert_eq!((record.total_steps(), record.seconds_left()), (Some(12), Some(20.0)));
        record.facts = Some(RunFacts { steps: 5, ..RunFacts::default() });
        assert_eq!((record.total_steps(), record.seconds_left(), record.seconds()), (Some(5), Some(6.0), 4.0));
    }
}

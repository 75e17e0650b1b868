//! `launch --copy`: the files for the hosts, where the hosts write the run, and how it comes back.
//!
//! The folder on the hosts depends on the path of the run here, not on the content. So a launch
//! with another comment, row or version finds the checkpoints of the last one.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicI32;
use std::time::{Duration, Instant};

use finetune_launch::Remote;
use finetune_launch::complaint::Trouble;
use finetune_launch::copy::{self, Bundle, CopyError};
use finetune_recipe::Recipe;
use finetune_rendezvous::own_name;
use finetune_store::{Disk, RealDisk, Staging, ensure_directory, numbered, remove_directory, verify_directory};
use finetune_trainer::{CHECKPOINTS, COPIES, TrainError};

use crate::cli::RunArguments;
use crate::commands::preflight;
use crate::failure::Failure;
use crate::progress::{Verbosity, bytes};

/// Time between two messages about a copy under way.
const SAY_EVERY: Duration = Duration::from_secs(5);

/// Files of a run that are not fetched.
const LEFT_THERE: [&str; 2] = [".lock", COPIES];

/// The files for the hosts, and the run that is made from them.
pub(crate) struct CopiedRun {
    bundle: Bundle,
    /// The run directory in the folder of the copy.
    run: String,
    /// The run directory on this host.
    home: PathBuf,
}

impl CopiedRun {
    pub(crate) fn pack(run: &RunArguments, recipe: &Recipe, stop: &AtomicI32) -> Result<CopiedRun, Failure> {
        let home = std::path::absolute(&recipe.output_dir)?;
        let holds_a_run = newest(&home) > 0 || ["adapter", "model"].iter().any(|name| home.join(name).is_dir());
        if run.resume.is_none() && holds_a_run {
            return Err(TrainError::Occupied { directory: home }.into());
        }
        let here = own_name();
        let name = home.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let folder = copy::folder(&name, &format!("{here} {}", home.display()));
        let bundle = Bundle::pack(&folder, &preflight::bundle_files(run, recipe)?, stop).map_err(|error| {
            let hint = match error {
                CopyError::Leads { .. } => "put the file itself there, or take the link out of the folder",
                _ => "every file of the recipe must be there to be copied",
            };
            Failure::arguments(error.to_string(), hint)
        })?;
        Ok(CopiedRun { bundle, run: preflight::directory_of_copy(recipe), home })
    }

    pub(crate) fn folder(&self) -> &str {
        self.bundle.folder()
    }

    fn run(&self) -> String {
        format!("{}/{}", self.bundle.folder(), self.run)
    }

    /// Host and path of the run.
    pub(crate) fn whereabouts(&self, remote: &Remote) -> String {
        format!("{}:~/{}", remote.host, self.run())
    }

    /// Sends a host the files that it lacks.
    pub(crate) fn bring(&self, remote: &Remote, verbosity: Verbosity, stop: &AtomicI32) -> Result<(), Failure> {
        let says = verbosity > Verbosity::Quiet;
        let mut said = Instant::now();
        let brought = self.bundle.bring(remote, stop, &mut |sent, of| {
            if says && said.elapsed() > SAY_EVERY {
                said = Instant::now();
                crate::stderr::complain!("{}: {} of {} copied", remote.host, bytes(sent), bytes(of));
            }
        });
        let files = brought.map_err(|error| failure(&remote.host, &error))?;
        if says {
            let what = match files {
                0 => format!("unchanged on {}", remote.host),
                1 => format!("copied to {} (1 file)", remote.host),
                files => format!("copied to {} ({files} files)", remote.host),
            };
            crate::stderr::complain!("program, recipe, model and rows {what}: {}", self.bundle.folder());
        }
        Ok(())
    }

    /// Sends the run to rank 0's host, if it is further here than there. `there`: the newest step
    /// on that host.
    pub(crate) fn send_run(
        &self,
        remote: &Remote,
        there: u64,
        verbosity: Verbosity,
        stop: &AtomicI32,
    ) -> Result<(), Failure> {
        if newest(&self.home) <= there {
            return Ok(());
        }
        let mut files = Vec::new();
        let mut add = |folder: &Path, name: &str| {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                let own = entry.file_name().to_string_lossy().into_owned();
                if entry.file_type().is_ok_and(|kind| kind.is_file()) && own != ".lock" {
                    files.push((format!("{name}{own}"), entry.path()));
                }
            }
        };
        add(&self.home, "");
        for (_, path) in numbered(&RealDisk, &self.home.join(CHECKPOINTS), "step-")? {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            add(&path, &format!("{CHECKPOINTS}/{name}/"));
        }
        if verbosity > Verbosity::Quiet {
            crate::stderr::complain!("the run in {} goes on at {}", self.home.display(), remote.host);
        }
        copy::send_files(remote, &self.run(), &files, stop).map_err(|error| failure(&remote.host, &error))
    }

    /// Fetches what is new of the run. Each checkpoint and result arrives whole or not at all.
    fn fetch(&self, remote: &Remote) -> Result<bool, Failure> {
        ensure_directory(&RealDisk, &self.home)?;
        let has = numbered(&RealDisk, &self.home.join(CHECKPOINTS), "step-")?;
        let has = has.iter().filter(|(_, path)| verify_directory(&RealDisk, path).is_ok());
        let has = has.filter_map(|(_, path)| Some(format!("{CHECKPOINTS}/{}", path.file_name()?.to_string_lossy())));
        let skip: Vec<String> = LEFT_THERE.iter().map(|name| (*name).to_owned()).chain(has).collect();
        // Used for its folder only, which is removed at the end.
        let staging = Staging::begin(&RealDisk, &self.home, "arrivals")?;
        // Beside the staging directory's own marker of unfinished work.
        let arrivals = staging.directory().join("run");
        ensure_directory(&RealDisk, &arrivals)?;
        // The first signal has been handled; a second one ends the program.
        let take = &mut |name: &str, from: &mut dyn Read| write(&arrivals.join(name), from);
        let found = copy::fetch(remote, &self.run(), &skip, &AtomicI32::new(0), take)
            .map_err(|error| failure(&remote.host, &error))?;
        for name in RealDisk.list(&arrivals)?.iter().filter(|name| *name != CHECKPOINTS) {
            settle(&arrivals.join(name), &self.home.join(name))?;
        }
        let checkpoints = self.home.join(CHECKPOINTS);
        for (_, path) in numbered(&RealDisk, &arrivals.join(CHECKPOINTS), "step-")? {
            ensure_directory(&RealDisk, &checkpoints)?;
            settle(&path, &checkpoints.join(path.file_name().unwrap_or_default()))?;
        }
        Ok(found)
    }
}

/// The newest step of a run directory.
fn newest(directory: &Path) -> u64 {
    preflight::newest(directory).map_or(0, |(step, _)| step)
}

fn write(path: &Path, from: &mut dyn Read) -> io::Result<()> {
    let parent = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent)?;
    let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
    io::copy(from, &mut file)?;
    file.sync_all()
}

/// Moves what has arrived into its place; a directory with a manifest only if it verifies.
fn settle(from: &Path, to: &Path) -> Result<(), Failure> {
    let parent = to.parent().unwrap_or(Path::new("."));
    if from.is_dir() {
        if from.join(finetune_store::MANIFEST_NAME).is_file() {
            verify_directory(&RealDisk, from)?;
        }
        RealDisk.sync_dir(from)?;
        if RealDisk.exists(to)? {
            remove_directory(&RealDisk, to)?;
        }
    }
    RealDisk.rename(from, to)?;
    RealDisk.sync_dir(parent)?;
    Ok(())
}

/// Fetches the run from rank 0's host. If it is done and here, removes the copies of all hosts.
/// Returns lines that say where the run is, and whether it is here.
pub(crate) fn bring_home(
    copied_run: &CopiedRun,
    first: Option<&Remote>,
    all: &[&Remote],
    done: bool,
    verbosity: Verbosity,
) -> (Vec<String>, bool) {
    let home = copied_run.home.display();
    let mut lines = Vec::new();
    if let Some(remote) = first {
        match copied_run.fetch(remote) {
            Ok(true) => lines.push(format!("the run is in {home}, brought from {}", remote.host)),
            // The run ended before it wrote anything.
            Ok(false) => return (Vec::new(), true),
            Err(failure) => {
                if verbosity > Verbosity::Quiet {
                    failure.print();
                }
                lines
                    .push(format!("the run could not be brought here and stays in {}", copied_run.whereabouts(remote)));
                return (lines, false);
            }
        }
    }
    if done {
        for remote in all {
            if let Err(error) = copy::remove(remote, copied_run.folder(), &AtomicI32::new(0)) {
                lines.push(format!(
                    "{}: the copy in ~/{} could not be removed: {error}",
                    remote.host,
                    copied_run.folder()
                ));
            }
        }
    }
    (lines, true)
}

/// The failure of a copy: the host is missing for now, or the user must correct something.
fn failure(host: &str, error: &CopyError) -> Failure {
    let message = format!("{host}: {error}");
    match error {
        CopyError::Host(unanswered) => {
            let hints = unanswered.hint(host).into_iter().collect();
            match unanswered.trouble() {
                Trouble::Absent => Failure::lost(message, hints),
                Trouble::Mistake => Failure::bad_input(message, hints),
            }
        }
        _ => Failure::bad_input(message, Vec::new()),
    }
}

//! The hosts of a launch: which they are, what each needs before it can start, and which are still
//! there.

use std::path::PathBuf;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use finetune_allreduce::DeviceMatrix;
use finetune_launch::{Remote, Unanswered, WorkerHost, reach};
use finetune_recipe::{Distributed, Recipe, StagesChoice};
use finetune_rendezvous::{HostPort, Hostfile, is_loopback, machine_name, own_name};
use finetune_trainer::numbers::counted;

use crate::cli::{LaunchArguments, RunArguments};
use crate::commands::preflight::{self, Question, Report};
use crate::copied_run::{self, CopiedRun};
use crate::failure::Failure;
use crate::progress::Verbosity;

mod answers;
mod left;

/// Time between two messages about hosts whose answers are waited for.
const SAY_EVERY: Duration = Duration::from_secs(5);

/// A host with one rank on it.
#[derive(Clone, Debug)]
struct Machine {
    /// Its place in the hostfile.
    place: usize,
    name: String,
    /// None: this host.
    remote: Option<Remote>,
    /// Addresses at which the others reach it, the best first.
    addresses: Vec<String>,
    /// Its last answer.
    report: Report,
}

/// All of them, in the order of the ranks.
pub(crate) struct Hosts {
    machines: Vec<Machine>,
    /// The number of hosts that take part: all, or as many as divide the virtual ranks.
    used: usize,
    file: Option<Hostfile>,
    /// The RDMA devices between the hosts of the hostfile.
    devices: Option<DeviceMatrix>,
    at_start: usize,
    /// The address of rank 0, if the other hosts know a better one than rank 0's host.
    address: Option<String>,
    /// The ports at which all ranks listen, if they are chosen.
    pub(crate) ports: Option<(u16, u16)>,
    /// With `--copy`.
    copied_run: Option<CopiedRun>,
}

/// What hosts need for a recipe.
const RECIPE_NEEDS: &str = "every host needs this version of the program, the recipe, the model and the rows at the same \
                            paths; --copy brings them";
/// What they need to use a model.
const MODEL_NEEDS: &str = "every host needs this version of the program, and the model at the same path";

impl Hosts {
    /// The number of ranks on this host that the arguments say, or one rank per host of the
    /// hostfile.
    pub(crate) fn choose(arguments: &LaunchArguments) -> Result<Hosts, Failure> {
        let all = |machines: Vec<Machine>, file, devices| {
            let at_start = machines.len();
            let (used, address, ports, copied_run) = (at_start, None, arguments.ports(), None);
            Hosts { machines, used, file, devices, at_start, address, ports, copied_run }
        };
        let Some(path) = &arguments.hostfile else {
            let ranks = arguments.ranks.unwrap_or(1);
            if ranks == 0 || ranks > 256 {
                return Err(Failure::arguments(format!("-n {ranks}: from 1 to 256 ranks"), "-n 2 is a good start"));
            }
            let addresses = vec!["127.0.0.1".to_owned()];
            let machine = Machine { place: 0, name: own_name(), remote: None, addresses, report: Report::default() };
            return Ok(all(vec![machine; ranks], None, None));
        };
        let file = Hostfile::load(path)?;
        let devices = file.devices()?;
        if let Some(address) = file.lost_coordinator() {
            return Err(unreachable_at(address));
        }
        let here = || std::env::current_exe().unwrap_or_else(|_| "finetune".into());
        let program = arguments.program.clone().unwrap_or_else(here);
        let directory = arguments.directory.clone().or_else(|| std::env::current_dir().ok());
        let remote = Remote { program, directory, config: arguments.ssh_config.clone(), ..Remote::default() };
        let machine = |(place, host): (usize, &finetune_rendezvous::Host)| Machine {
            place,
            name: host.ssh.clone(),
            addresses: host.ips.clone(),
            remote: WorkerHost::of(host, &remote).remote().cloned(),
            report: Report::default(),
        };
        let machines: Vec<Machine> = file.hosts.iter().enumerate().map(machine).collect();
        Ok(all(machines, Some(file), devices))
    }

    /// Notes about keys of the hostfile that have no effect.
    pub(crate) fn notices(&self) -> &[String] {
        self.file.as_ref().map(|file| file.notices.as_slice()).unwrap_or_default()
    }

    /// The number of ranks.
    pub(crate) fn world(&self) -> usize {
        self.used
    }

    /// Takes as many hosts as the recipe can use, if they are enough for it.
    pub(crate) fn limit(&mut self, recipe: &Recipe) -> Result<(), Failure> {
        let Distributed { virtual_ranks, min_ranks, .. } = recipe.distributed;
        let there = self.machines.len();
        // Ranks that hold a model together compute the same shares. With `auto` it may be all of them.
        let stages = match recipe.parallel.stages {
            StagesChoice::Count(stages) => Some(stages),
            StagesChoice::Auto => None,
        };
        let evenly = |models: usize| virtual_ranks.is_none_or(|shares| shares.is_multiple_of(models));
        let usable = |ranks: &usize| match stages {
            Some(stages) => ranks.is_multiple_of(stages) && evenly(ranks / stages),
            None => true,
        };
        self.used = (1..=there).rev().find(usable).unwrap_or(0).min(there);
        // At the start the user has to change the number. Later the launch goes on with the hosts
        // that are left.
        if there == self.at_start && self.used < there {
            let fact = match (stages, virtual_ranks) {
                (Some(stages), _) if !there.is_multiple_of(stages) => {
                    let ranks = counted(there as u64, "rank");
                    let are = if there == 1 { "is" } else { "are" };
                    format!(
                        "parallel.stages = {stages} ranks hold a model together, and {ranks} {are} no multiple of it"
                    )
                }
                _ => {
                    let shares = virtual_ranks.unwrap_or_default();
                    format!("distributed.virtual_ranks = {shares} cannot be shared out evenly among {there} ranks")
                }
            };
            let enough = (1..).find(|ranks| usable(ranks)).unwrap_or(1).max(self.used);
            return Err(Failure::arguments(fact, format!("{} would do", counted(enough as u64, "rank"))));
        }
        match left::too_few(there, self.used, self.at_start, min_ranks, stages) {
            Some((fact, hints)) => Err(Failure::lost(fact, hints)),
            None => Ok(()),
        }
    }

    /// Makes sure that every other host has what it needs, and with `--copy` sends it. A signal
    /// ends this early; no rank runs yet.
    pub(crate) fn prepare(
        &mut self,
        arguments: &LaunchArguments,
        run: &RunArguments,
        recipe: &Recipe,
        verbosity: Verbosity,
        stop: &AtomicI32,
    ) -> Result<(), Failure> {
        self.ports = self.ports.or(recipe.distributed.ports);
        if self.remotes().next().is_none() {
            return Ok(());
        }
        let is_stopped = || stop.load(Ordering::SeqCst) != 0;
        if arguments.copy {
            let copied_run = CopiedRun::pack(run, recipe, stop);
            if is_stopped() {
                return Ok(());
            }
            let copied_run = copied_run?;
            let words = preflight::words_of_copy(run, recipe);
            for machine in &mut self.machines {
                let Some(remote) = &mut machine.remote else { continue };
                let brought = copied_run.bring(remote, verbosity, stop);
                if is_stopped() {
                    return Ok(());
                }
                brought?;
                remote.program = PathBuf::from("./finetune");
                remote.directory = Some(PathBuf::from(copied_run.folder()));
                remote.words = Some(words.clone());
            }
            self.copied_run = Some(copied_run);
        }
        let name = self.name_of_rank_0();
        let question =
            Question { watched: true, resolve: Some(name.clone()), ports: self.ports, ..Question::default() };
        let Some(ours) = report_here(recipe, &question, stop) else { return Ok(()) };
        let answers = self.ask(&arguments.run, &question, verbosity, stop);
        if is_stopped() {
            return Ok(());
        }
        self.judge(answers, &ours, RECIPE_NEEDS, verbosity)?;
        self.find_rank_0(&name)?;
        self.warn_of_shared_hosts(verbosity);
        if let Some(copied_run) = &self.copied_run
            && run.resume == Some(None)
            && let (Some(remote), newest) = (&self.machines[0].remote, &self.machines[0].report.newest)
        {
            copied_run.send_run(remote, newest.as_ref().map_or(0, |(step, _)| *step), verbosity, stop)?;
        }
        Ok(())
    }

    /// The same for ranks that only use a model, with this command: they compare what they are started with when they
    /// join.
    pub(crate) fn prepare_to_use(
        &mut self,
        command: &str,
        verbosity: Verbosity,
        stop: &AtomicI32,
    ) -> Result<(), Failure> {
        if self.remotes().next().is_none() {
            return Ok(());
        }
        let name = self.name_of_rank_0();
        let (resolve, ports) = (Some(name.clone()), self.ports);
        let question = Question { watched: true, only_uses: true, resolve, ports, ..Question::default() };
        let answers = self.ask(&[command.to_owned()], &question, verbosity, stop);
        if stop.load(Ordering::SeqCst) != 0 {
            return Ok(());
        }
        self.judge(answers, &Report::without_recipe(&question), MODEL_NEEDS, verbosity)?;
        self.find_rank_0(&name)?;
        self.warn_of_shared_hosts(verbosity);
        Ok(())
    }

    /// Asks all other hosts, and says so if it takes long.
    fn ask(
        &self,
        words: &[String],
        question: &Question,
        verbosity: Verbosity,
        stop: &AtomicI32,
    ) -> Vec<Result<reach::Answer, Unanswered>> {
        let remotes: Vec<&Remote> = self.remotes().collect();
        let question = serde_json::to_string(question).expect("plain data");
        let (sender, answers) = channel();
        std::thread::scope(|scope| {
            let remotes = &remotes;
            scope.spawn(move || {
                let words = |remote: &Remote| preflight::words(remote.words.as_deref().unwrap_or(words));
                let _ = sender.send(reach::all(remotes, words, &question, stop));
            });
            let began = Instant::now();
            loop {
                match answers.recv_timeout(SAY_EVERY) {
                    Ok(answers) => return answers,
                    Err(RecvTimeoutError::Disconnected) => return Vec::new(),
                    Err(RecvTimeoutError::Timeout) if verbosity > Verbosity::Quiet => {
                        let seconds = began.elapsed().as_secs();
                        crate::stderr::complain!(
                            "waiting for what the hosts say of themselves and their files ({seconds} s)"
                        );
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                }
            }
        })
    }

    fn warn_of_shared_hosts(&self, verbosity: Verbosity) {
        for (index, machine) in self.machines.iter().enumerate() {
            let same =
                self.machines[..index].iter().find(|other| is_same(other, machine) && other.name != machine.name);
            if let Some(same) = same.filter(|_| verbosity > Verbosity::Quiet) {
                crate::stderr::complain!(
                    "{} and {} are one machine: their ranks share its threads and GPUs",
                    same.name,
                    machine.name
                );
            }
        }
    }

    fn remotes(&self) -> impl Iterator<Item = &Remote> {
        self.machines.iter().filter_map(|machine| machine.remote.as_ref())
    }

    /// From now on all ranks resume from the newest checkpoint.
    pub(crate) fn resume(&mut self) {
        for words in self.machines.iter_mut().filter_map(|machine| machine.remote.as_mut()?.words.as_mut()) {
            words.retain(|word| word != "--resume" && !word.starts_with("--resume="));
            words.push("--resume".to_owned());
        }
    }

    /// Drops hosts that do not answer any more, and returns their names. The others report the
    /// newest checkpoint on their disks, and are ranked as they are cabled, behind the first of them.
    pub(crate) fn drop_unreachable(&mut self, words: &[String], verbosity: Verbosity, stop: &AtomicI32) -> Vec<String> {
        let question = Question { watched: true, brief: true, ports: self.ports, ..Question::default() };
        let mut answers = self.ask(words, &question, verbosity, stop).into_iter();
        let first = self.machines.first().map(|machine| machine.name.clone());
        let mut lost = Vec::new();
        self.machines.retain_mut(|machine| {
            if machine.remote.is_none() {
                return true;
            }
            let report = answers.next().and_then(Result::ok).and_then(|answer| Report::parse(&answer).ok());
            match report {
                Some(mut report) => {
                    report.resolved = std::mem::take(&mut machine.report.resolved);
                    machine.report = report;
                    true
                }
                None => {
                    lost.push(machine.name.clone());
                    false
                }
            }
        });
        if self.machines.first().map(|machine| &machine.name) != first.as_ref() {
            self.address = None;
        }
        if !lost.is_empty()
            && let Some(devices) = &self.devices
        {
            let order = left::by_cables(&self.places(self.machines.len()), devices);
            self.machines.sort_by_key(|machine| order.iter().position(|place| *place == machine.place));
        }
        lost
    }

    /// Refuses to begin again if the newest checkpoint lies on a host that is not reached. `saved`:
    /// the newest checkpoint that there was; `host`: the host that wrote it. Returns a note if the
    /// run goes on from an older one.
    pub(crate) fn expect_progress(&self, saved: Option<(u64, PathBuf)>, host: &str) -> Result<Option<String>, Failure> {
        let Some((step, path)) = saved.filter(|(step, _)| *step > 0) else { return Ok(None) };
        if self.machines.first().is_some_and(|machine| machine.name == host) {
            return Ok(None);
        }
        let newest = self.machines.iter().filter_map(|machine| machine.report.newest.as_ref());
        match newest.map(|(step, _)| *step).max() {
            Some(there) if there >= step => Ok(None),
            Some(there) => Ok(Some(format!("step {step} was saved on {host} only: going on from step {there}"))),
            None => Err(Failure::lost(
                format!(
                    "{host} holds the run and is not reached any more: its newest checkpoint is {} there, and no other host has one",
                    path.display()
                ),
                vec![
                    format!("the same command with --resume goes on from it once {host} is back"),
                    "checkpoint.copies = 1 keeps each checkpoint on one more host".to_owned(),
                ],
            )),
        }
    }

    /// The newest checkpoint that rank 0's host reports, and that host's name.
    pub(crate) fn holder(&self) -> (Option<(u64, PathBuf)>, String) {
        let first = self.machines.first();
        (
            first.and_then(|machine| machine.report.newest.clone()),
            first.map(|machine| machine.name.clone()).unwrap_or_default(),
        )
    }

    /// Whether rank 0 writes the run on this host.
    pub(crate) fn writes_here(&self) -> bool {
        self.machines.first().is_some_and(|machine| machine.remote.is_none())
    }

    /// With `--copy`: fetches the run to this host, and removes the copies if it is done. Returns
    /// lines that say where the run is, and whether it is here.
    pub(crate) fn bring_home(&self, done: bool, verbosity: Verbosity) -> Option<(Vec<String>, bool)> {
        let copied_run = self.copied_run.as_ref()?;
        let remotes: Vec<&Remote> = self.remotes().collect();
        Some(copied_run::bring_home(copied_run, self.machines[0].remote.as_ref(), &remotes, done, verbosity))
    }

    /// With `--copy`: where rank 0 writes the run, host and path.
    pub(crate) fn whereabouts(&self) -> Option<String> {
        let (copied_run, remote) = (self.copied_run.as_ref()?, self.machines.first()?.remote.as_ref()?);
        Some(copied_run.whereabouts(remote))
    }

    /// Where each rank runs.
    pub(crate) fn workers(&self) -> Vec<WorkerHost> {
        let host = |machine: &Machine| machine.remote.clone().map_or(WorkerHost::Local, WorkerHost::Ssh);
        self.machines[..self.used].iter().map(host).collect()
    }

    /// The rank among the ranks of its host, and their number.
    pub(crate) fn local(&self, rank: usize) -> (usize, usize) {
        let same = |machine: &&Machine| is_same(machine, &self.machines[rank]);
        (self.machines[..rank].iter().filter(same).count(), self.machines[..self.used].iter().filter(same).count())
    }

    /// The addresses of a rank's host in the hostfile.
    pub(crate) fn addresses(&self, rank: usize) -> &[String] {
        &self.machines[rank].addresses
    }

    /// A rank's name in messages.
    pub(crate) fn name(&self, rank: usize) -> String {
        format!("rank {rank} ({})", self.machines[rank].name)
    }

    /// The host of a rank, as ssh takes it.
    pub(crate) fn host(&self, rank: usize) -> &str {
        &self.machines[rank].name
    }

    /// The label of a rank's lines of output.
    pub(crate) fn label(&self, rank: usize) -> String {
        format!("rank {rank} {}", self.machines[rank].name)
    }

    /// The name or address of rank 0.
    fn name_of_rank_0(&self) -> String {
        let first = &self.machines[0];
        let outside = first.addresses.iter().find(|address| !is_loopback(address));
        match (outside.or(first.addresses.first()), &first.remote) {
            (Some(address), _) => address.clone(),
            (None, Some(remote)) => machine_name(&remote.host).to_owned(),
            (None, None) if is_loopback(&first.name) => "localhost".to_owned(),
            (None, None) => first.name.clone(),
        }
    }

    /// Where every other host reaches rank 0; at `port` if it is given.
    pub(crate) fn rendezvous(&self, port: Option<u16>) -> Result<HostPort, Failure> {
        let is_local = self.machines[..self.used].iter().all(|machine| machine.remote.is_none());
        let found = || match &self.machines[0].remote {
            Some(_) => self.machines[0].report.port,
            None => preflight::free_port(self.ports),
        };
        let Some(port) = port.or_else(found) else {
            let range = self.ports.map_or(String::new(), |(first, last)| format!(" from {first} to {last}"));
            return Err(Failure::arguments(
                format!("no TCP port{range} is free at {}", self.machines[0].name),
                "another run may have them: end it, or name others with distributed.ports or --port",
            ));
        };
        let host = if is_local {
            "127.0.0.1".to_owned()
        } else {
            self.address.clone().unwrap_or_else(|| self.name_of_rank_0())
        };
        Ok(HostPort { host, port })
    }

    /// The RDMA devices between the ranks: those of the hosts that take part.
    pub(crate) fn devices(&self) -> Option<DeviceMatrix> {
        self.devices.as_ref().map(|devices| devices.between(&self.places(self.used)))
    }

    /// The places of the first so many hosts in the hostfile.
    fn places(&self, count: usize) -> Vec<usize> {
        self.machines[..count].iter().map(|machine| machine.place).collect()
    }

    /// Whether the hostfile names MLX's backend "jaccl-ring".
    pub(crate) fn prefer_ring(&self) -> bool {
        let backend = self.file.as_ref().and_then(|file| file.backend.as_deref());
        matches!(backend, Some("jaccl-ring"))
    }

    /// Variables that the hostfile sets on every host.
    pub(crate) fn environment(&self) -> Vec<(String, String)> {
        self.file.as_ref().map(|file| file.environment.clone()).unwrap_or_default()
    }
}

/// Compares the identities of the machines, or the names if a host gives no identity.
fn is_same(one: &Machine, other: &Machine) -> bool {
    match (&one.report.machine, &other.report.machine) {
        (Some(one), Some(other)) => one == other,
        _ => one.name == other.name,
    }
}

/// The report of this host, unless a signal comes first: hashing many rows takes a while.
fn report_here(recipe: &Recipe, question: &Question, stop: &AtomicI32) -> Option<Report> {
    let (recipe, question, (sender, report)) = (recipe.clone(), question.clone(), channel());
    std::thread::spawn(move || {
        let _ = sender.send(Report::here(&recipe, &question, &mut |_| {}));
    });
    loop {
        match report.recv_timeout(Duration::from_millis(20)) {
            Ok(report) => return Some(report),
            Err(_) if stop.load(Ordering::SeqCst) != 0 => return None,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return Some(Report::of_machine(finetune_rendezvous::identity::machine()));
            }
        }
    }
}

pub(crate) fn unreachable_at(address: &str) -> Failure {
    Failure::arguments(
        format!("the other hosts cannot reach rank 0 at {address}"),
        "give the first host of the hostfile its address: {\"ssh\": \"localhost\", \"ips\": [\"10.0.0.1\"]}",
    )
}

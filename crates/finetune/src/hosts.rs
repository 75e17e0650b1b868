//! The machines of a launch: which they are, what each needs before it can start, and which are still there.

use std::path::PathBuf;

use finetune_cluster::workers::{Place, Remote};
use finetune_cluster::{Hostfile, copy, reach};
use finetune_recipe::Recipe;

use crate::cli::{LaunchArguments, RunArguments};
use crate::commands::preflight::{self, Report};
use crate::failure::Failure;
use crate::progress::Verbosity;

/// A machine with one rank on it.
#[derive(Clone, Debug)]
struct Machine {
    name: String,
    /// None: this machine.
    remote: Option<Remote>,
    /// Addresses at which the others reach it, the best first.
    addresses: Vec<String>,
}

/// All of them, in the order of the ranks.
pub(crate) struct Hosts {
    machines: Vec<Machine>,
    /// How many of them take part: all, or as many as divide the virtual ranks.
    used: usize,
    /// What the hostfile says, as long as all its hosts are used.
    file: Option<Hostfile>,
    at_start: usize,
}

impl Hosts {
    /// As many ranks here as asked for, or one per host of the hostfile.
    pub(crate) fn choose(arguments: &LaunchArguments) -> Result<Hosts, Failure> {
        let Some(path) = &arguments.hostfile else {
            let ranks = arguments.ranks.unwrap_or(1);
            if ranks == 0 || ranks > 256 {
                return Err(Failure::arguments(format!("-n {ranks}: from 1 to 256 ranks"), "-n 2 is a good start"));
            }
            let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
            let machine = Machine { name, remote: None, addresses: vec!["127.0.0.1".to_owned()] };
            return Ok(Hosts { machines: vec![machine; ranks], used: ranks, file: None, at_start: ranks });
        };
        let file = Hostfile::load(path)
            .map_err(|error| Failure::Arguments { message: error.to_string(), hints: error.hints() })?;
        file.devices().map_err(|error| Failure::Arguments { message: error.to_string(), hints: error.hints() })?;
        let here = || std::env::current_exe().unwrap_or_else(|_| "finetune".into());
        let program = arguments.program.clone().unwrap_or_else(here);
        let directory = arguments.directory.clone().or_else(|| std::env::current_dir().ok());
        let machine = |host: &finetune_cluster::Host| Machine {
            name: host.ssh.clone(),
            addresses: host.ips.clone(),
            remote: (!matches!(host.ssh.as_str(), "localhost" | "127.0.0.1" | "::1")).then(|| Remote {
                host: host.ssh.clone(),
                program: program.clone(),
                directory: directory.clone(),
                config: arguments.ssh_config.clone(),
                words: None,
            }),
        };
        let machines: Vec<Machine> = file.hosts.iter().map(machine).collect();
        let at_start = machines.len();
        Ok(Hosts { machines, used: at_start, file: Some(file), at_start })
    }

    /// The number of ranks.
    pub(crate) fn world(&self) -> usize {
        self.used
    }

    /// Takes as many machines as the recipe can use, if they are enough for it.
    pub(crate) fn limit(&mut self, virtual_ranks: Option<usize>, min_ranks: Option<usize>) -> Result<(), Failure> {
        let there = self.machines.len();
        let usable = |ranks: &usize| virtual_ranks.is_none_or(|shares| shares.is_multiple_of(*ranks));
        self.used = (1..=there).rev().find(usable).unwrap_or(1);
        // At the start it is for the user to say how many; later we take what is left.
        if there == self.at_start && self.used < there {
            let shares = virtual_ranks.unwrap_or_default();
            return Err(Failure::arguments(
                format!("distributed.virtual_ranks = {shares} cannot be shared out evenly among {there} ranks"),
                format!("{} ranks would do", self.used),
            ));
        }
        let least = min_ranks.unwrap_or(self.at_start);
        if self.used < least {
            return Err(Failure::Lost {
                message: format!("{} of {} hosts are left, and the recipe needs {least} ranks", there, self.at_start),
                hints: vec!["distributed.min_ranks in the recipe lets a restart go on with fewer".to_owned()],
            });
        }
        Ok(())
    }

    /// Makes sure that every other machine has what it needs, and brings it there if asked to.
    pub(crate) fn prepare(
        &mut self,
        arguments: &LaunchArguments,
        run: &RunArguments,
        recipe: &Recipe,
        verbosity: Verbosity,
    ) -> Result<(), Failure> {
        if self.remotes().next().is_none() {
            return Ok(());
        }
        if arguments.copy {
            let cargo = copy::Cargo::pack(&crate::commands::preflight::parcels(run, recipe)?).map_err(|error| {
                Failure::arguments(error.to_string(), "every file of the recipe must be there to be copied")
            })?;
            let words = preflight::words_of_copy(run, recipe);
            for machine in &mut self.machines {
                let Some(remote) = &mut machine.remote else { continue };
                let sent = cargo.bring(remote).map_err(|error| {
                    Failure::arguments(format!("{}: {error}", machine.name), "does `ssh` reach it without a password?")
                })?;
                if verbosity > Verbosity::Quiet {
                    let what = if sent { "copied to" } else { "unchanged on" };
                    anstream::eprintln!("program, recipe, model and rows {what} {}: {}", machine.name, cargo.folder());
                }
                remote.program = PathBuf::from("./finetune");
                remote.directory = Some(PathBuf::from(cargo.folder()));
                remote.words = Some(words.clone());
            }
        }
        let ours = Report::here(recipe);
        let remotes: Vec<&Remote> = self.remotes().collect();
        let answers =
            reach::all(&remotes, |remote| preflight::words(remote.words.as_deref().unwrap_or(&arguments.run)));
        let mut problems = Vec::new();
        for (remote, answer) in remotes.iter().zip(answers) {
            match answer.and_then(|text| Report::parse(&text)) {
                Ok(report) => {
                    problems.extend(
                        report.problems(&ours).into_iter().map(|problem| format!("{}: {problem}", remote.host)),
                    );
                    for warning in report.warnings(&ours) {
                        anstream::eprintln!("{}: {warning}", remote.host);
                    }
                }
                Err(why) => problems.push(format!("{}: {why}", remote.host)),
            }
        }
        if problems.is_empty() {
            return Ok(());
        }
        Err(Failure::Arguments {
            message: format!("not every host is ready:\n  {}", problems.join("\n  ")),
            hints: vec![
                "every host needs this version of the program, the recipe, the model and the rows at the same paths; --copy brings them".into(),
                "--program and --directory say where they lie on the hosts, if elsewhere than here".into(),
            ],
        })
    }

    fn remotes(&self) -> impl Iterator<Item = &Remote> {
        self.machines.iter().filter_map(|machine| machine.remote.as_ref())
    }

    /// From now on all go on from the newest checkpoint.
    pub(crate) fn resume(&mut self) {
        for words in self.machines.iter_mut().filter_map(|machine| machine.remote.as_mut()?.words.as_mut()) {
            words.retain(|word| word != "--resume" && !word.starts_with("--resume="));
            words.push("--resume".to_owned());
        }
    }

    /// Forgets hosts that do not answer any more, and says which. The first one holds the run.
    pub(crate) fn drop_unreachable(&mut self) -> Vec<String> {
        let remotes: Vec<&Remote> = self.remotes().collect();
        let mut answers = reach::all(&remotes, |_| vec!["--version".to_owned()]).into_iter();
        let there: Vec<bool> = self
            .machines
            .iter()
            .map(|machine| machine.remote.is_none() || answers.next().is_some_and(|it| it.is_ok()))
            .collect();
        let mut lost = Vec::new();
        let mut there = there.into_iter();
        self.machines.retain(|machine| {
            let is_there = there.next().unwrap_or(true);
            if !is_there {
                lost.push(machine.name.clone());
            }
            is_there
        });
        lost
    }

    pub(crate) fn places(&self) -> Vec<Place> {
        let place = |machine: &Machine| machine.remote.clone().map_or(Place::Here, Place::Ssh);
        self.machines[..self.used].iter().map(place).collect()
    }

    /// A rank's place among those of its machine, and how many they are.
    pub(crate) fn local(&self, rank: usize) -> (usize, usize) {
        let same = |machine: &&Machine| machine.name == self.machines[rank].name;
        (self.machines[..rank].iter().filter(same).count(), self.machines[..self.used].iter().filter(same).count())
    }

    /// What messages call a rank.
    pub(crate) fn name(&self, rank: usize) -> String {
        format!("rank {rank} ({})", self.machines[rank].name)
    }

    /// What its lines of output begin with.
    pub(crate) fn label(&self, rank: usize) -> String {
        format!("rank {rank} {}", self.machines[rank].name)
    }

    /// host:port where rank 0 is reached from every other machine.
    pub(crate) fn rendezvous(&self, port: u16) -> Result<String, Failure> {
        let first = &self.machines[0];
        if self.machines[..self.used].iter().all(|machine| machine.remote.is_none()) {
            return Ok(format!("127.0.0.1:{port}"));
        }
        let address = match (first.addresses.first(), &first.remote) {
            (Some(address), _) => address.clone(),
            (None, Some(remote)) => remote.host.rsplit('@').next().unwrap_or_default().to_owned(),
            (None, None) => {
                return Err(Failure::arguments(
                    "the other hosts cannot reach rank 0 at localhost",
                    "give the first host of the hostfile its address: {\"ssh\": \"localhost\", \"ips\": [\"10.0.0.1\"]}",
                ));
            }
        };
        Ok(if address.contains(':') { format!("[{address}]:{port}") } else { format!("{address}:{port}") })
    }

    /// The RDMA devices between the ranks. A hostfile describes all its hosts: it does not fit some of them.
    pub(crate) fn devices(&self) -> Option<serde_json::Value> {
        let file = self.file.as_ref().filter(|file| file.hosts.len() == self.used)?;
        let devices = file.devices().ok().flatten()?;
        serde_json::from_str(&devices.to_json()).ok()
    }

    /// MLX's backends "ring" and "jaccl-ring".
    pub(crate) fn prefer_ring(&self) -> bool {
        let backend = self.file.as_ref().and_then(|file| file.backend.as_deref());
        matches!(backend, Some("jaccl-ring"))
    }

    /// Variables that the hostfile sets on every host.
    pub(crate) fn environment(&self) -> Vec<(String, String)> {
        self.file.as_ref().map(|file| file.environment.clone()).unwrap_or_default()
    }
}

/// A port that nobody uses now. Rank 0 may run elsewhere: then it is a guess in a range that systems leave alone.
pub(crate) fn free_port() -> Result<u16, Failure> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    listener
        .map(|address| address.port())
        .map_err(|error| Failure::arguments(error.to_string(), "no TCP port can be had"))
}

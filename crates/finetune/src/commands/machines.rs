//! `finetune cluster discover`, `setup` and `doctor`.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use finetune_advice::Advice as _;
use finetune_launch::gather::run_command;
use finetune_rendezvous::{Hostfile, is_this_host};
use finetune_store::{RealDisk, replace_file};
use finetune_thunderbolt::discover::Discovery;
use finetune_thunderbolt::doctor::{self, Expected, Verdict};
use finetune_thunderbolt::gather::{DEADLINE, gather};
use finetune_thunderbolt::{Questions, diagram, setup};
use finetune_trainer::numbers::counted;

use crate::cli::{DiscoverArguments, DoctorArguments, HostsArguments, SetupArguments};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output;

/// For one command of the set-up.
const STEP_DEADLINE: Duration = Duration::from_secs(60);

fn ask(arguments: &HostsArguments, questions: &Questions<'_>) -> Result<Discovery, Failure> {
    let hosts: Vec<String> = match &arguments.hostfile {
        Some(path) => {
            let file = Hostfile::load(path)?;
            file.notices.iter().for_each(|notice| crate::stderr::complain!("{notice}"));
            file.hosts.into_iter().map(|host| host.ssh).collect()
        }
        None if arguments.hosts.is_empty() => vec!["localhost".to_owned()],
        None => arguments.hosts.clone(),
    };
    let discovery = Discovery::new(gather(&hosts, questions, DEADLINE));
    for error in &discovery.unreachable {
        crate::stderr::complain!("\x1b[1;33mwarning\x1b[0m: {error}");
        error.hints().iter().for_each(|hint| crate::stderr::complain!("\x1b[1;36mhint\x1b[0m: {hint}"));
    }
    if discovery.hosts.is_empty() {
        return Err(Failure::arguments("no host answered", "`ssh -o BatchMode=yes HOST true` must succeed"));
    }
    Ok(discovery)
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    Ok(replace_file(&RealDisk, path, text.as_bytes())?)
}

pub(crate) fn discover(arguments: &DiscoverArguments) -> Result<ExitCode, Failure> {
    let discovery = ask(&arguments.hosts, &Questions::default())?;
    if arguments.dot {
        output::print(&diagram::dot(&discovery))?;
        return Ok(ExitCode::SUCCESS);
    }
    crate::stderr::complain!("{}", diagram::text(&discovery));
    discovery.sentences().iter().for_each(|sentence| crate::stderr::complain!("{sentence}"));
    if let Some(path) = &arguments.svg {
        write(path, &diagram::svg(&discovery))?;
        crate::stderr::complain!("the picture is in {}", path.display());
    }
    if let Some(proposal) = discovery.proposal() {
        proposal.notes.iter().for_each(|note| crate::stderr::complain!("{note}"));
        match &arguments.output {
            None => output::print(&proposal.hostfile.to_json())?,
            Some(path) => {
                write(path, &proposal.hostfile.to_json())?;
                crate::stderr::complain!("the hostfile is in {}", path.display());
            }
        }
    }
    Ok(if discovery.unreachable.is_empty() { Exit::Done } else { Exit::Input }.into())
}

pub(crate) fn setup(arguments: &SetupArguments) -> Result<ExitCode, Failure> {
    let discovery = ask(&arguments.hosts, &Questions { root: arguments.apply, ..Questions::default() })?;
    let plan = setup::plan(&discovery)?;
    output::print(&setup::text(&plan))?;
    if arguments.apply && !plan.steps.is_empty() {
        let mut run = |host: &str, command: &str| {
            crate::stderr::complain!("{host}: {command}");
            run_command(host, command, STEP_DEADLINE)
        };
        let done = setup::apply(&plan, &mut run)?;
        let done = counted(done as u64, "command");
        crate::stderr::complain!("{done} done; `finetune cluster doctor` looks at the result");
    } else if !plan.steps.is_empty() {
        crate::stderr::complain!("--apply runs these commands");
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn doctor(arguments: &DoctorArguments) -> Result<ExitCode, Failure> {
    let questions = Questions { root: true, ..Questions::default() };
    // Here it is this very program, wherever it lies.
    let alone = arguments.hosts.hostfile.is_none() && arguments.hosts.hosts.iter().all(|host| is_this_host(host));
    let here = || if alone { std::env::current_exe().ok() } else { None };
    let program = arguments.program.clone().or_else(here);
    let questions = program.as_deref().map_or(questions, |program| Questions { program, ..questions });
    let discovery = ask(&arguments.hosts, &questions)?;
    let mut checks = doctor::examine(&discovery, &Expected { rdma: arguments.rdma, ..Expected::default() });
    if discovery.hosts.len() > 1 {
        checks.extend(doctor::reach(&discovery, DEADLINE));
    }
    if arguments.json {
        for check in &checks {
            output::line(&serde_json::to_string(check).expect("plain data"))?;
        }
    } else {
        output::print(&doctor::text(&checks, arguments.all))?;
    }
    let fails = doctor::worst(&checks) == Verdict::Fail || !discovery.unreachable.is_empty();
    Ok(if fails { Exit::Input } else { Exit::Done }.into())
}

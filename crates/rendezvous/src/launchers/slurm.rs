//! Slurm's variables, and how a task of `srun` differs from a process that merely runs in a job.
//!
//! A batch script and an interactive shell have `SLURM_PROCID=0` and the `SLURM_NTASKS` of the
//! whole job. The first task of an `srun` with that many tasks has the same. A program that took a
//! batch script for a task would wait for ranks that are never started. The differences
//! (SchedMD/slurm, src/common/env.c):
//!
//! - Both srun and slurmstepd give a task `SLURM_STEP_ID`; slurmstepd leaves it out for the batch
//!   script, whose step has no number of its own. It does give `SLURM_TASK_PID` to every process
//!   that it starts.
//! - The shell of `salloc` is a step with a number that is reserved (`SLURM_INTERACTIVE_STEP`,
//!   4294967290).
//! - `SLURM_STEP_NUM_TASKS` counts the tasks of the step. `SLURM_NTASKS` can be the job's: in the
//!   shell of `salloc`, under `srun --preserve-env`, and in a batch script that was submitted from
//!   inside a step and inherits its number.

use super::address::{self, DEFAULT_PORT, HostPort, port_of_job};
use super::error::{EnvironmentError, shown};
use super::torchrun::{MASTER_ADDR, MASTER_PORT};
use super::variables::{Number, Setting, Variables};
use super::{Launcher, Unchecked};

const STEP: [&str; 2] = ["SLURM_STEP_ID", "SLURM_STEPID"];
const JOB: [&str; 2] = ["SLURM_JOB_ID", "SLURM_JOBID"];
const TASKS: [&str; 3] = ["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"];
const NODES: [&str; 3] = ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"];
/// `SLURM_MAX_NORMAL_STEP_ID` of slurm.h; above are the batch script, the interactive step and
/// others.
const FIRST_RESERVED_STEP: u64 = 0xffff_fff0;

pub(super) fn read(variables: &Variables<'_>) -> Result<Option<Unchecked>, EnvironmentError> {
    let launcher = Launcher::Slurm;
    let Some((rank, world)) = rank_and_world(variables)? else {
        return Ok(None);
    };
    let local_rank = variables.number(&["SLURM_LOCALID"])?;
    let local_world = local_world(variables, &world, local_rank.as_ref());
    let is_here = local_world.as_ref().is_some_and(|local| local.value == world.value);
    let rendezvous = if world.value > 1 { rendezvous(variables, &rank, is_here)? } else { None };
    Ok(Some(Unchecked { launcher, rank, world, local_rank, local_world, rendezvous }))
}

/// Of a task of `srun`.
pub(super) fn rank_and_world(variables: &Variables<'_>) -> Result<Option<(Number, Number)>, EnvironmentError> {
    if !is_task(variables) {
        return Ok(None);
    }
    let Some(rank) = variables.number(&["SLURM_PROCID"])? else {
        return Ok(None);
    };
    let world = variables.number(&TASKS)?.ok_or_else(|| rank.without("SLURM_NTASKS", Launcher::Slurm))?;
    Ok(Some((rank, world)))
}

pub(super) fn tasks_without_srun(variables: &Variables<'_>) -> Option<usize> {
    let is_in_job = variables.first(&JOB).is_some();
    let is_started = variables.first(&["SLURM_PROCID"]).is_some() && is_task(variables);
    let tasks = variables.number(&["SLURM_NTASKS", "SLURM_NPROCS"]).ok()??.value;
    (is_in_job && !is_started && tasks > 1).then_some(tasks)
}

/// The name of the job and of the step in it: two steps may be given the same port. A heterogeneous job has one name, and
/// parts with numbers of their own.
pub(super) fn job(variables: &Variables<'_>) -> Option<String> {
    if let Some(whole) = variables.first(&["SLURM_HET_JOB_ID", "SLURM_PACK_JOB_ID"]) {
        return Some(whole.value);
    }
    let job = variables.first(&JOB)?.value;
    Some(match variables.first(&STEP) {
        Some(step) => format!("{job}.{}", step.value),
        None => job,
    })
}

/// False if slurmstepd started this process, or a parent of it, but not as a task of `srun`.
fn is_task(variables: &Variables<'_>) -> bool {
    match variables.first(&STEP) {
        Some(step) => step.value.parse::<u64>().is_ok_and(|step| step < FIRST_RESERVED_STEP),
        // Without a step, Slurm's own marks prove that this is no task. If there are none, the user
        // has set SLURM_PROCID and SLURM_NTASKS by hand.
        None => {
            let is_batch = |setting: Setting| setting.value == "BATCH";
            variables.first(&["SLURM_TASK_PID"]).is_none() && !variables.first(&["ENVIRONMENT"]).is_some_and(is_batch)
        }
    }
}

/// The number of tasks on this node, if Slurm says it.
fn local_world(variables: &Variables<'_>, world: &Number, local_rank: Option<&Number>) -> Option<Number> {
    let tasks = variables.first(&["SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"]);
    let node = variables.number(&["SLURM_NODEID"]).ok().flatten();
    let here = tasks
        .zip(node)
        .and_then(|(tasks, node)| Some(Number { name: tasks.name, value: tasks_on_node(&tasks.value, node.value)? }));
    let count = variables.first(&["SLURM_STEP_NUM_NODES", "SLURM_NNODES"]).filter(|count| count.value == "1");
    let only_one = variables.first(&NODES).filter(|nodes| !nodes.value.contains([',', '[']));
    let alone = count.or(only_one).map(|_| Number { name: world.name, value: world.value });
    // The list may be the job's, with room for more tasks than the step has.
    let lowest = local_rank.map_or(1, |local| local.value.saturating_add(1));
    here.filter(|here| (lowest..=world.value).contains(&here.value)).or(alone)
}

/// Entry `node` of a list such as "2(x3),1", which stands for 2, 2, 2, 1.
fn tasks_on_node(list: &str, node: usize) -> Option<usize> {
    let mut nodes = 0_usize;
    for part in list.split(',') {
        let (tasks, repeats) = match part.split_once("(x") {
            Some((tasks, repeats)) => (tasks, repeats.strip_suffix(')')?.parse().ok()?),
            None => (part, 1),
        };
        nodes = nodes.checked_add(repeats)?;
        if node < nodes {
            return tasks.parse().ok();
        }
    }
    None
}

/// Whether the tasks are not numbered along the list of nodes. Every task can see the first sign,
/// and rank 0 the second one.
fn is_arbitrary(variables: &Variables<'_>, rank: &Number) -> bool {
    let asked = variables.first(&["SLURM_DISTRIBUTION"]).is_some_and(|how| how.value.starts_with("arbitrary"));
    let seen = || variables.number(&["SLURM_NODEID"]).is_ok_and(|node| node.is_some_and(|node| node.value > 0));
    asked || (rank.value == 0 && seen())
}

fn rendezvous(variables: &Variables<'_>, rank: &Number, is_here: bool) -> Result<Option<HostPort>, EnvironmentError> {
    let host = match (address::host(variables, &[MASTER_ADDR])?, variables.first(&NODES)) {
        (Some(host), _) => Some(host),
        (None, Some(_)) if !is_here && is_arbitrary(variables, rank) => None,
        // Slurm numbers the tasks along the list of nodes, so the first one has rank 0.
        (None, Some(nodes)) => Some(first_host(&nodes.value).map_err(|what| EnvironmentError::NodeList {
            name: nodes.name,
            value: shown(&nodes.value),
            what,
        })?),
        (None, None) => is_here.then(|| "127.0.0.1".to_owned()),
    };
    let Some(host) = host else {
        return Ok(None);
    };
    let job = variables.first(&JOB).map(|job| {
        let step = variables.first(&STEP).map_or_else(|| "0".to_owned(), |step| step.value);
        port_of_job(&format!("{}.{step}", job.value))
    });
    let port = address::port(variables, &[MASTER_PORT])?.or(job).unwrap_or(DEFAULT_PORT);
    Ok(Some(HostPort { host, port }))
}

/// The first host of a list such as "gpu[01-03,7],login1" or "rack[2-3]node[0-9]-ib": each bracket
/// stands for the numbers in it, written with the zeros that they have there.
fn first_host(list: &str) -> Result<String, &'static str> {
    let mut host = String::new();
    let mut rest = list;
    loop {
        let end = rest.find([',', '[', ']']).unwrap_or(rest.len());
        let (plain, after) = rest.split_at(end);
        host.push_str(plain);
        match after.chars().next() {
            None | Some(',') => break,
            Some('[') => {
                let (group, after) = after[1..].split_once(']').ok_or("a bracket is not closed")?;
                host.push_str(first_number(group)?);
                rest = after;
            }
            _ => return Err("a bracket is closed that was not opened"),
        }
    }
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    match host.as_bytes() {
        [] => Err("the first host has no name"),
        [b'-', ..] => Err("the first host starts with '-'"),
        bytes if bytes.len() > 253 => Err("the first host is longer than 253 bytes"),
        bytes if !bytes.iter().all(|&byte| is_plain(byte)) => Err("the first host has a character that no name has"),
        _ => Ok(host),
    }
}

/// The first number of "01-03,7".
fn first_number(group: &str) -> Result<&str, &'static str> {
    let mut first = None;
    for range in group.split(',') {
        let (low, high) = range.split_once('-').unwrap_or((range, range));
        let is_number =
            |text: &str| !text.is_empty() && text.len() <= 18 && text.bytes().all(|byte| byte.is_ascii_digit());
        if !is_number(low) || !is_number(high) {
            return Err("in brackets there are numbers and ranges of numbers only");
        }
        // Of the same or a greater length; with leading zeros the texts compare as the numbers do.
        if (high.len(), high) < (low.len(), low) {
            return Err("a range goes backwards");
        }
        first.get_or_insert(low);
    }
    first.ok_or("a bracket is empty")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_hosts() {
        #[rustfmt::skip]
        let cases = [
            ("gpu[01-03,7],login1", Ok("gpu01")),
            ("node001", Ok("node001")),
            ("node001,host2", Ok("node001")),
            ("node[001-0015],host2", Ok("node001")),
            ("node[007,1-3]", Ok("node007")),
            ("node[9-10]", Ok("node9")),
            ("rack[2-3]node[0-9]-ib,a[1]", Ok("rack2node0-ib")),
            ("c[5]", Ok("c5")),
            ("[1-4]", Ok("1")),
            ("a.example.org,b[1", Ok("a.example.org")),
            ("", Err("the first host has no name")),
            (",a", Err("the first host has no name")),
            ("gpu[01-03", Err("a bracket is not closed")),
            ("gpu]01", Err("a bracket is closed that was not opened")),
            ("gpu[]", Err("in brackets there are numbers and ranges of numbers only")),
            ("gpu[1,]", Err("in brackets there are numbers and ranges of numbers only")),
            ("gpu[a-b]", Err("in brackets there are numbers and ranges of numbers only")),
            ("gpu[[1]]", Err("in brackets there are numbers and ranges of numbers only")),
            ("gpu[-3]", Err("in brackets there are numbers and ranges of numbers only")),
            ("gpu[3-1]", Err("a range goes backwards")),
            ("gpu[10-9]", Err("a range goes backwards")),
            ("-oProxyCommand=x", Err("the first host starts with '-'")),
            ("gpu 1", Err("the first host has a character that no name has")),
            ("gpü", Err("the first host has a character that no name has")),
        ];
        for (list, expected) in cases {
            assert_eq!(first_host(list).as_deref(), expected.as_ref().copied(), "{list}");
        }
        assert_eq!(first_host(&"a".repeat(254)), Err("the first host is longer than 253 bytes"));
    }

    #[test]
    fn tasks_per_node() {
        for (list, expected) in [
            ("2(x3),1", [Some(2), Some(2), Some(2), Some(1), None]),
            ("4", [Some(4), None, None, None, None]),
            ("1,2,1(x99)", [Some(1), Some(2), Some(1), Some(1), Some(1)]),
            ("", [None; 5]),
            ("x(x3)", [None; 5]),
            ("2(x", [None; 5]),
            ("2(x18446744073709551615),3(x9)", [Some(2); 5]),
        ] {
            assert_eq!([0, 1, 2, 3, 4].map(|node| tasks_on_node(list, node)), expected, "{list}");
        }
    }
}

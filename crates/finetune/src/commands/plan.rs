//! `finetune plan`: what fits where, and how long a step takes.

use std::process::ExitCode;

use finetune_launch::gather::GatherError;
use finetune_rendezvous::{Hostfile, is_this_host};
use finetune_thunderbolt::Questions;
use finetune_thunderbolt::facts::{Facts, System};
use finetune_thunderbolt::gather::{DEADLINE, gather};
use finetune_trainer::numbers::counted;
use finetune_trainer::{Machines, MachinesPlan, Way};

use crate::cli::PlanArguments;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::given_recipe::GivenRecipe;
use crate::progress::{Progress, Verbosity, bytes, thousands};
use crate::stderr::complain;
use crate::text_table::columns;
use crate::{hub_files, memory, output};

pub(crate) fn plan(arguments: &PlanArguments, verbosity: Verbosity) -> Result<ExitCode, Failure> {
    let machines = machines(arguments)?;
    let given = GivenRecipe::of(&arguments.recipe, None)?;
    let mut recipe = given.load(&arguments.recipe.sets, None)?;
    hub_files::localize_headers(&mut recipe)?;
    let mut show = Progress::new(if arguments.json { Verbosity::Quiet } else { verbosity }, 1);
    show.start("reading rows", 0);
    let found = finetune_trainer::plan(&recipe, machines, &|rows| show.position(rows));
    show.finish();
    let found = found?;
    if arguments.json {
        output::line(&serde_json::to_string(&found).expect("plain data"))?;
    } else {
        output::print(&text(&found))?;
    }
    Ok(if found.best.is_some() { Exit::Done } else { Exit::DiskOrMemory }.into())
}

fn machines(arguments: &PlanArguments) -> Result<Machines, Failure> {
    let file = arguments.hostfile.as_deref().map(Hostfile::load).transpose()?;
    let cables = file.as_ref().map(Hostfile::devices).transpose()?.flatten();
    let names: Vec<String> = file.into_iter().flat_map(|file| file.hosts).map(|host| host.ssh).collect();
    let hosts = if arguments.hostfile.is_some() { names.len() } else { arguments.hosts };
    if hosts == 0 {
        return Err(Failure::bad_input("--hosts 0: there is nothing to plan for".to_owned(), Vec::new()));
    }
    let each = match &arguments.memory {
        Some(text) => memories(text, hosts)?,
        None if names.is_empty() => memory::machine_bytes().into_iter().collect(),
        None => memory_of_hosts(&names),
    };
    let memory = each.iter().min().copied();
    let memory_of_each = if each.iter().any(|bytes| Some(*bytes) != memory) { each } else { Vec::new() };
    let disk = number("--disk", &arguments.disk, 1000.0)?;
    let link = number("--link", &arguments.link, 1000.0)? / 8.0;
    Ok(Machines { hosts, memory, memory_of_each, disk, link, cables })
}

/// Bytes of memory of each host. One that does not answer counts like this machine.
fn memory_of_hosts(names: &[String]) -> Vec<u64> {
    let Some(here) = memory::machine_bytes() else { return Vec::new() };
    let of_host = |(name, found): (&String, Result<Facts, GatherError>)| match found {
        Ok(_) if is_this_host(name) => here,
        // macOS and its window server need the rest.
        Ok(facts) => match (facts.memory_bytes, facts.system) {
            (Some(bytes), System::Mac) => bytes - (bytes / 8).max(2 << 30).min(bytes / 2),
            (Some(bytes), _) => bytes,
            (None, _) => here,
        },
        Err(error) => {
            complain!(
                "\x1b[1;33mwarning\x1b[0m: {error}; {name} counts as a machine like this one (--memory says its memory)"
            );
            here
        }
    };
    names.iter().zip(gather(names, &Questions::default(), DEADLINE)).map(of_host).collect()
}

/// Bytes of memory of all machines, or of each.
fn memories(text: &str, hosts: usize) -> Result<Vec<u64>, Failure> {
    let bytes = |text: &str| number("--memory", text, 1024.0).map(|bytes| bytes as u64);
    let each: Vec<u64> = text.split(',').map(bytes).collect::<Result<_, _>>()?;
    if each.len() == 1 || each.len() == hosts {
        return Ok(each);
    }
    let machines = counted(hosts as u64, "machine");
    let hints = vec!["write the memory of each machine in the order of their ranks, or one for all".to_owned()];
    Err(Failure::bad_input(format!("--memory {text}: these are {} sizes, and there are {machines}", each.len()), hints))
}

/// A number above 0 with a unit: K, M, G or T are powers of `thousand`. `B`, `iB`, `bit` and `/s` behind it change
/// nothing.
fn number(option: &str, text: &str, thousand: f64) -> Result<f64, Failure> {
    let wrong = || {
        let hints = vec![format!("write a number and a unit, such as {option} 64G or {option} 2.8G")];
        Failure::bad_input(format!("{option} {text}: this is no size"), hints)
    };
    let plain = ["/s", "bit", "iB", "B"].iter().fold(text.trim(), |text, end| text.strip_suffix(end).unwrap_or(text));
    let units = [("K", 1), ("k", 1), ("M", 2), ("G", 3), ("T", 4)];
    let unit = units.iter().find_map(|(unit, power)| Some((plain.strip_suffix(unit)?, *power)));
    let (digits, power) = unit.unwrap_or((plain, 0));
    let value: f64 = digits.trim().parse().map_err(|_| wrong())?;
    let value = value * thousand.powi(power);
    if value.is_finite() && value >= 1.0 { Ok(value) } else { Err(wrong()) }
}

fn text(plan: &MachinesPlan) -> String {
    let MachinesPlan { machines, parameters, trained_parameters, layers, disk, steps, ways, best, hints } = plan;
    let hosts = counted(machines.hosts as u64, "machine");
    let memory = match machines.memory_of_each.is_empty() {
        true => machines.memory.map_or("unknown memory".to_owned(), bytes),
        false => machines.memory_of_each.iter().copied().map(bytes).collect::<Vec<_>>().join(", "),
    };
    let mut text = format!(
        "machines    {hosts}: {memory}, a disk of {}/s, a link of {}/s\n",
        bytes(machines.disk as u64),
        bytes(machines.link as u64)
    );
    text += &format!(
        "model       {} parameters, {} trained; layers {}\n",
        thousands(*parameters),
        thousands(*trained_parameters),
        bytes(*layers)
    );
    text += &format!("run         {}, {} on disk where rank 0 is\n\n", counted(*steps, "step"), bytes(*disk));
    let head = ["", "memory", "fits", "s a step", "busy", "read a step", "sent a step"];
    let head: Vec<String> = head.iter().map(|word| (*word).to_owned()).collect();
    let rows: Vec<Vec<String>> = std::iter::once(head).chain(ways.iter().map(row)).collect();
    text += &columns(&rows);
    let idle: Vec<String> = ways.iter().filter_map(idle).collect();
    if !idle.is_empty() {
        text += &format!("\n{}", idle.concat());
    }
    match best {
        Some(best) => {
            let settings: Vec<String> = ways[*best].settings.iter().map(|set| format!("--set {set}")).collect();
            text += &format!("\ntake        {}\n", settings.join(" "));
        }
        None => {
            text += "\nnothing fits\n";
            hints.iter().for_each(|hint| text += &format!("hint        {hint}\n"));
        }
    }
    text
}

/// What it costs that layers do not go round a ring.
fn idle(way: &Way) -> Option<String> {
    let percent = |part: f64| format!("{:.0} %", 100.0 * part);
    let (busy, in_ring) = (percent(way.busy?), percent(way.busy_in_ring?));
    let name = name(way);
    Some(format!(
        "busy        {name}: {busy} of a step; in turn, with a cable from the last machine to the first, {in_ring}\n"
    ))
}

/// What a way is, with the number of machines and how their layers lie.
fn name(way: &Way) -> String {
    let name = match way.stages {
        1 => way.name.to_owned(),
        stages => way.name.replace("machines", &counted(stages as u64, "machine")),
    };
    let name = match way.placement {
        Some("contiguous") => format!("{name}, next to each other"),
        Some(_) => format!("{name}, there and back"),
        None => name,
    };
    match way.layers.is_empty() {
        true => name,
        false => {
            let layers: Vec<String> = way.layers.iter().map(usize::to_string).collect();
            format!("{name}: {}", layers.join(", "))
        }
    }
}

fn row(way: &Way) -> Vec<String> {
    let seconds = |seconds: f64| if seconds < 10.0 { format!("{seconds:.2}") } else { format!("{seconds:.0}") };
    let fits = match way.fits {
        Some(true) => "yes",
        Some(false) => "no",
        None => "?",
    };
    vec![
        name(way),
        bytes(way.memory),
        fits.to_owned(),
        way.seconds.map_or("?".to_owned(), seconds),
        way.busy.map_or("?".to_owned(), |busy| format!("{:.0} %", 100.0 * busy)),
        if way.read == 0 { "-".to_owned() } else { bytes(way.read) },
        if way.sent == 0 { "-".to_owned() } else { bytes(way.sent) },
    ]
}

#[cfg(test)]
mod tests {
    use super::{memories, number};

    #[test]
    fn machines_may_differ_in_memory() {
        const GIB: u64 = 1 << 30;
        for (text, hosts, want) in [
            ("64G", 3, Some(vec![64 * GIB])),
            ("64G,32G", 2, Some(vec![64 * GIB, 32 * GIB])),
            ("64G, 0.5G,1G", 3, Some(vec![64 * GIB, GIB / 2, GIB])),
            ("64G,32G", 3, None),
            ("64G,", 2, None),
            ("64G,32X", 2, None),
        ] {
            assert_eq!(memories(text, hosts).ok(), want, "{text} {hosts}");
        }
    }

    #[test]
    fn sizes_have_units() {
        for (text, want) in [("64G", 64.0 * 1024.0 * 1024.0 * 1024.0), ("512M", 536_870_912.0), ("1.5K", 1536.0)] {
            assert_eq!(number("--memory", text, 1024.0).ok(), Some(want), "{text}");
        }
        for (text, want) in [("2.8G", 2.8e9), ("2.8GB/s", 2.8e9), ("10Gbit/s", 1e10), ("100", 100.0)] {
            assert_eq!(number("--disk", text, 1000.0).ok(), Some(want), "{text}");
        }
        for text in ["", "G", "-1G", "0", "nan", "inf", "1X", "64 houses"] {
            assert!(number("--memory", text, 1024.0).is_err(), "{text}");
        }
    }
}

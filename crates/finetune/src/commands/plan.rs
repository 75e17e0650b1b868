//! `finetune plan`: what fits where, and how long a step takes.

use std::process::ExitCode;

use finetune_launch::gather::GatherError;
use finetune_rendezvous::{Hostfile, is_this_host};
use finetune_thunderbolt::Questions;
use finetune_thunderbolt::facts::{Facts, System};
use finetune_thunderbolt::gather::{DEADLINE, gather};
use finetune_trainer::numbers::counted;
use finetune_trainer::{Machines, MachinesPlan, RankNeed, Way};

use crate::cli::PlanArguments;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::given_recipe::GivenRecipe;
use crate::progress::{Progress, Verbosity, bytes, thousands};
use crate::size::{BINARY, DECIMAL, size};
use crate::stderr::complain;
use crate::text_table::columns;
use crate::{hub_files, memory, output};

/// Ranks of a group have numbers of 16 bits.
const MOST_HOSTS: usize = u16::MAX as usize;

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
    if hosts > MOST_HOSTS {
        let message = format!("--hosts {hosts}: a group has at most {MOST_HOSTS} ranks");
        return Err(Failure::arguments(message, "plan for fewer machines"));
    }
    let each = match &arguments.memory {
        Some(text) => memories(text, hosts)?,
        None if names.is_empty() => memory::machine_bytes().into_iter().collect(),
        None => memory_of_hosts(&names),
    };
    let memory = each.iter().min().copied();
    let memory_of_each = if each.iter().any(|bytes| Some(*bytes) != memory) { each } else { Vec::new() };
    let disk = size("--disk", &arguments.disk, DECIMAL)?;
    let link = size("--link", &arguments.link, DECIMAL)? / 8.0;
    Ok(Machines { hosts, names, memory, memory_of_each, disk, link, cables })
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
    let bytes = |text: &str| size("--memory", text, BINARY).map(|bytes| bytes as u64);
    let each: Vec<u64> = text.split(',').map(bytes).collect::<Result<_, _>>()?;
    if each.len() == 1 || each.len() == hosts {
        return Ok(each);
    }
    let machines = counted(hosts as u64, "machine");
    let hints = vec!["write the memory of each machine in the order of their ranks, or one for all".to_owned()];
    Err(Failure::bad_input(format!("--memory {text}: these are {} sizes, and there are {machines}", each.len()), hints))
}

fn text(plan: &MachinesPlan) -> String {
    let MachinesPlan { parameters, trained_parameters, layers, disk, steps, ways, best, hints, notices, .. } = plan;
    let mut text = machines_line(&plan.machines);
    text += &format!(
        "model       {} parameters, {} trained; layers {}\n",
        thousands(*parameters),
        thousands(*trained_parameters),
        bytes(*layers)
    );
    text += &format!("run         {}, {} on disk where rank 0 is\n", counted(*steps, "step"), bytes(*disk));
    if plan.machines.hosts > 1 {
        text += &exchange_line(plan);
    }
    notices.iter().for_each(|notice| text += &format!("note        {notice}\n"));
    let head = ["", "memory", "fits", "s a step", "busy", "read a step", "sent a step"];
    let head: Vec<String> = head.iter().map(|word| (*word).to_owned()).collect();
    let rows: Vec<Vec<String>> = std::iter::once(head).chain(ways.iter().map(row)).collect();
    text += &format!("\n{}\n", columns(&rows));
    let idle: Vec<String> = ways.iter().filter_map(idle).collect();
    if !idle.is_empty() {
        text += &format!("{}\n", idle.concat());
    }
    match best {
        Some(best) => {
            text += &ranks(&ways[*best]);
            text += &format!("\ntake        {}\n", words(&ways[*best].settings));
        }
        None => {
            // What is nearest to fitting.
            text += &ways.iter().min_by_key(|way| way.memory).map(ranks).unwrap_or_default();
            text += "\nnothing fits\n";
        }
    }
    hints.iter().for_each(|hint| text += &format!("hint        {hint}\n"));
    text
}

/// Settings as words of a command line. Shells would look for files that a list in brackets could mean.
fn words(settings: &[String]) -> String {
    let word = |set: &String| if set.contains('[') { format!("--set '{set}'") } else { format!("--set {set}") };
    settings.iter().map(word).collect::<Vec<_>>().join(" ")
}

fn machines_line(machines: &Machines) -> String {
    let hosts = counted(machines.hosts as u64, "machine");
    let memory = match machines.memory_of_each.is_empty() {
        true => machines.memory.map_or("unknown memory".to_owned(), bytes),
        false => machines.memory_of_each.iter().copied().map(bytes).collect::<Vec<_>>().join(", "),
    };
    let (disk, link) = (bytes(machines.disk as u64), bytes(machines.link as u64));
    format!("machines    {hosts}: {memory}, a disk of {disk}/s, a link of {link}/s\n")
}

/// How ranks exchange what they learn.
fn exchange_line(plan: &MachinesPlan) -> String {
    match plan.sync_every {
        1 => format!("exchange    gradients in {}, every step\n", plan.wire),
        steps => format!("exchange    averages in {}, every {steps} steps\n", plan.wire),
    }
}

/// What each rank takes. Ranks that follow each other and take the same are one line.
fn ranks(way: &Way) -> String {
    let head = [way.name, "layers", "memory", "of", "disk", "base", "run"].map(str::to_owned).to_vec();
    let line = |(from, to): &(usize, usize)| {
        let RankNeed { rank, host, layers, memory, available, base, run, disk, .. } = &way.ranks[*from];
        let last = way.ranks[*to].rank;
        let name = match (from == to, host) {
            (true, Some(host)) => format!("rank {rank} ({host})"),
            (true, None) => format!("rank {rank}"),
            (false, _) => format!("ranks {rank} to {last}"),
        };
        let of = available.map_or("?".to_owned(), bytes);
        vec![name, layers.to_string(), bytes(*memory), of, bytes(*disk), bytes(*base), bytes(*run)]
    };
    let rows: Vec<Vec<String>> = std::iter::once(head).chain(spans(&way.ranks).iter().map(line)).collect();
    columns(&rows)
}

/// (first, last) of the ranks that follow each other and take the same.
fn spans(ranks: &[RankNeed]) -> Vec<(usize, usize)> {
    let alike = |a: &RankNeed, b: &RankNeed| {
        let of = |rank: &RankNeed| (rank.layers, rank.memory, rank.available, rank.base, rank.run);
        of(a) == of(b)
    };
    let mut spans: Vec<(usize, usize)> = Vec::new();
    for (n, rank) in ranks.iter().enumerate() {
        match spans.last_mut() {
            Some((_, last)) if alike(&ranks[*last], rank) => *last = n,
            _ => spans.push((n, n)),
        }
    }
    spans
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
    use super::{memories, spans, words};

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
    fn settings_are_words_for_a_shell() {
        let settings = ["parallel.stages=2", "parallel.layers=[4, 1]"].map(str::to_owned);
        assert_eq!(words(&settings), "--set parallel.stages=2 --set 'parallel.layers=[4, 1]'");
    }

    #[test]
    fn ranks_that_take_the_same_are_one_line() {
        use finetune_trainer::RankNeed;
        let rank = |rank: usize, memory: u64| RankNeed {
            rank,
            host: None,
            layers: 4,
            trained: 2,
            memory,
            available: None,
            fits: None,
            read: 0,
            base: 1,
            run: 0,
            disk: 1,
        };
        let ranks: Vec<RankNeed> = [5, 4, 4, 4, 5].iter().enumerate().map(|(n, bytes)| rank(n, *bytes)).collect();
        assert_eq!(spans(&ranks), [(0, 0), (1, 3), (4, 4)]);
        assert!(spans(&[]).is_empty());
    }
}

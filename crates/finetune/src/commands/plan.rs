//! `finetune plan`: what fits where, and how long a step takes.

use std::process::ExitCode;

use finetune_hub::Need;
use finetune_rendezvous::Hostfile;
use finetune_trainer::numbers::counted;
use finetune_trainer::{Machines, MachinesPlan, Way};

use crate::cli::PlanArguments;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::given_recipe::GivenRecipe;
use crate::progress::{Progress, Verbosity, bytes, thousands};
use crate::text_table::columns;
use crate::{hub_files, memory, output};

pub(crate) fn plan(arguments: &PlanArguments, verbosity: Verbosity) -> Result<ExitCode, Failure> {
    let machines = machines(arguments)?;
    let given = GivenRecipe::of(&arguments.recipe, None)?;
    let mut recipe = given.load(&arguments.recipe.sets, None)?;
    hub_files::localize(&mut recipe, &Need::Model)?;
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
    let hosts = match &arguments.hostfile {
        Some(path) => Hostfile::load(path)?.hosts.len(),
        None => arguments.hosts,
    };
    if hosts == 0 {
        return Err(Failure::bad_input("--hosts 0: there is nothing to plan for".to_owned(), Vec::new()));
    }
    let memory = match &arguments.memory {
        Some(text) => Some(number("--memory", text, 1024.0)? as u64),
        None => memory::machine_bytes(),
    };
    let disk = number("--disk", &arguments.disk, 1000.0)?;
    let link = number("--link", &arguments.link, 1000.0)? / 8.0;
    Ok(Machines { hosts, memory, disk, link })
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
    let memory = machines.memory.map_or("unknown memory".to_owned(), bytes);
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

fn row(way: &Way) -> Vec<String> {
    let seconds = |seconds: f64| if seconds < 10.0 { format!("{seconds:.2}") } else { format!("{seconds:.0}") };
    let fits = match way.fits {
        Some(true) => "yes",
        Some(false) => "no",
        None => "?",
    };
    let name = match way.stages {
        1 => way.name.to_owned(),
        stages => way.name.replace("machines", &counted(stages as u64, "machine")),
    };
    vec![
        name,
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
    use super::number;

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

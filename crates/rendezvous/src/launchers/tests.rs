//! Environments as launchers leave them, each with what is read from it.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use expect_test::expect_file;
use finetune_advice::Advice as _;

use super::{Environment, Launcher};

/// Files that the variables of the tests name.
const FILES: [(&str, &str); 9] = [
    ("ring", r#"[["10.0.0.1:5000","10.0.1.1:5000"],["10.0.0.2:5000","10.0.1.2:5000"]]"#),
    ("here", r#"[["127.0.0.1:32323"],["127.0.0.1:32324"],["127.0.0.1:32325"]]"#),
    ("two-each", r#"[["a:1"],["a:2"],["b:1"],["b:2"]]"#),
    ("mesh", r#"[[null,"rdma_en5"],["rdma_en5",null]]"#),
    ("alone", "\n"),
    ("one", "[[null]]"),
    ("hostfile", r#"[{"ssh":"mac1","ips":["10.0.0.1"]}]"#),
    ("no-port", r#"[["10.0.0.1:5000"],["10.0.0.2"]]"#),
    ("bad-mesh", r#"[[null,7],[null,null]]"#),
];

fn file(path: &Path) -> io::Result<String> {
    let found = FILES.iter().find(|(name, _)| Path::new(name) == path);
    found.map(|(_, text)| (*text).to_owned()).ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// "RANK=1 WORLD_SIZE=2" as the process's environment.
fn variables(text: &str) -> impl Fn(&str) -> Option<String> {
    let pairs = text.split_whitespace().map(|pair| pair.split_once('=').expect("NAME=VALUE"));
    let map: BTreeMap<String, String> = pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    move |name| map.get(name).cloned()
}

/// What is read, in one line; an error with its hints.
fn seen(text: &str) -> String {
    match Environment::read(&variables(text), &file) {
        Ok(None) => "alone".to_owned(),
        Ok(Some(seen)) => {
            assert!(seen.rank < seen.world && seen.local_rank < seen.local_world && seen.local_world <= seen.world);
            assert!(seen.world == 1 || seen.rendezvous.is_some());
            let place = format!("{}/{} here {}/{}", seen.rank, seen.world, seen.local_rank, seen.local_world);
            let at = seen.rendezvous.map(|rendezvous| format!(" at {rendezvous}")).unwrap_or_default();
            let devices = seen.devices.map(|devices| format!(" {:?}", devices.shape())).unwrap_or_default();
            let hosts = seen.hosts.map(|hosts| format!(" {hosts:?}")).unwrap_or_default();
            let ring = if seen.prefer_ring { " as a ring" } else { "" };
            let job = seen.job.map(|job| format!(" job {job}")).unwrap_or_default();
            let note = seen.note.map(|note| format!("\nnote: {note}")).unwrap_or_default();
            format!("{:?} {place}{at}{devices}{hosts}{ring}{job}{note}", seen.launcher)
        }
        Err(error) => {
            let hints = error.hints().into_iter().map(|hint| format!("\nhint: {hint}"));
            format!("error: {error}{}", hints.collect::<String>())
        }
    }
}

/// `cases.txt` holds both: lines that are not indented are environments, the indented lines below
/// each are what is read from it.
#[test]
fn cases() {
    let mut text = String::new();
    for line in include_str!("cases.txt").lines().filter(|line| !line.starts_with(' ')) {
        text += line;
        text += "\n";
        if !line.is_empty() && !line.starts_with('#') {
            let answer = seen(line).lines().map(|line| format!("    {line}\n")).collect::<String>();
            text += &answer;
        }
    }
    expect_file!["cases.txt"].assert_eq(&text);
}

#[test]
fn nothing_set() {
    assert_eq!(seen(""), "alone");
}

#[test]
fn tasks_that_stay_idle() {
    for (text, expected) in [
        ("", None),
        ("SLURM_NTASKS=4", None),
        ("SLURM_JOB_ID=7 SLURM_NTASKS=4", Some(4)),
        ("SLURM_JOB_ID=7 SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_TASK_PID=9", None),
        ("SLURM_JOB_ID=7 SLURM_NTASKS=4 SLURM_PROCID=0 SLURM_TASK_PID=9", Some(4)),
        ("SLURM_JOB_ID=7 SLURM_NTASKS=4 SLURM_PROCID=0 SLURM_TASK_PID=9 SLURM_STEP_ID=4294967290", Some(4)),
        ("SLURM_JOB_ID=7 SLURM_NTASKS=4 SLURM_PROCID=0 SLURM_TASK_PID=9 SLURM_STEP_ID=0", None),
        ("SLURM_JOB_ID=7 SLURM_NTASKS=x", None),
    ] {
        assert_eq!(Environment::slurm_tasks_without_srun(&variables(text)), expected, "{text}");
    }
}

#[test]
fn white_space_is_no_value() {
    let read = |rank: &str, world: &str| {
        let (rank, world) = (rank.to_owned(), world.to_owned());
        let variables = move |name: &str| match name {
            "RANK" => Some(rank.clone()),
            "WORLD_SIZE" => Some(world.clone()),
            _ => None,
        };
        Environment::read(&variables, &file)
    };
    assert_eq!(read(" ", "\t").unwrap(), None);
    let seen = read(" 0\n", "1 ").unwrap().unwrap();
    assert_eq!((seen.launcher, seen.rank, seen.world), (Launcher::Torchrun, 0, 1));
    // A long value with line breaks stays one short line.
    let message = read(&"a\nb".repeat(1000), "1").unwrap_err().to_string();
    assert!(message.len() < 300 && !message.contains('\n'), "{message}");
}

#[test]
fn a_file_over_the_limit_is_not_read_to_its_end() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("devices.json");
    std::fs::File::create_new(&path).unwrap().set_len(5 << 20).unwrap();
    let text = super::read_text(&path).unwrap();
    assert_eq!(text.len(), super::MAX_DEVICE_FILE_BYTES + 1);
}

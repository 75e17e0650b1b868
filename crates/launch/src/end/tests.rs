//! The script runs in the shell at hand.

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::Command;

use super::*;

fn run(mark: &str, process: u32) -> bool {
    let output = Command::new("sh").args(["-c", &script(mark, process)]).output().expect("sh");
    String::from_utf8_lossy(&output.stdout).lines().any(|line| line == "ended")
}

#[test]
fn a_stopped_command_is_ended_with_what_it_started() {
    let mark = "finetune-0123";
    let mut command = Command::new("sh");
    command.args(["-c", &line(mark, "sleep 600 & echo $!; kill -s STOP $$; wait")]).process_group(0);
    let mut child = command.stdout(std::process::Stdio::piped()).spawn().expect("sh");
    let mut inner = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.take().expect("asked for")), &mut inner)
        .expect("a number");
    // Another command that has the number is none of ours.
    assert!(run("finetune-4567", child.id()), "it is not there");
    assert!(matches!(child.try_wait(), Ok(None)), "it was left alone");
    run(mark, child.id());
    assert_eq!(child.wait().expect("a child of ours").signal(), Some(9));
    let there = || Command::new("kill").args(["-0", inner.trim()]).stderr(std::process::Stdio::null()).status();
    let began = std::time::Instant::now();
    while there().expect("kill").success() {
        assert!(began.elapsed() < Duration::from_secs(60), "process {inner} is left over");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(run(mark, u32::MAX - 1), "nobody has this number");
}

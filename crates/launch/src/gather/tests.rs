//! Commands on this host, and their deadlines.

use super::*;

const DEADLINE: Duration = Duration::from_secs(20);

#[test]
fn names_that_are_options_never_reach_ssh() {
    let error = run_command("-oProxyCommand=true", "true", DEADLINE).unwrap_err();
    assert!(error.to_string().contains("taken for an option"), "{error}");
    assert!(run_command("a b", "true", DEADLINE).is_err());
}

#[test]
fn deadlines_end_the_children_too() {
    let began = Instant::now();
    let ran = run("localhost", "m", "sleep 600 & echo $!; sleep 600", Duration::from_millis(300)).unwrap();
    assert!(ran.status.is_none() && began.elapsed() < Duration::from_secs(5));
    let grandchild = String::from_utf8(ran.output).unwrap().trim().to_owned();
    let is_there = || run_command("localhost", &format!("kill -0 {grandchild}"), DEADLINE).unwrap().succeeded;
    let patience = Instant::now() + DEADLINE;
    while is_there() {
        assert!(Instant::now() < patience, "process {grandchild} outlives the deadline");
        thread::sleep(NAP);
    }
}

#[test]
fn commands_of_the_set_up() {
    let run = |command| run_command("localhost", command, DEADLINE).unwrap();
    assert_eq!(run("echo 'a b'; echo c >&2"), Output { succeeded: true, words: "a b\nc".into() });
    assert_eq!(run("exit 3"), Output { succeeded: false, words: String::new() });
}

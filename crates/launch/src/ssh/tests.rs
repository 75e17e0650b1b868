//! What a host would run, run by the shell at hand, and the options of ssh.

use std::os::unix::fs::PermissionsExt;

use super::*;

/// A program in the place of ours.
fn remote(folder: &std::path::Path, program: &str) -> Remote {
    let path = folder.join("it's a program!");
    let mut file = std::fs::File::options().create(true).truncate(true).write(true).open(&path).expect("a file");
    std::io::Write::write_all(&mut file, format!("#!/bin/sh\n{program}\n").as_bytes()).expect("written");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).expect("executable");
    Remote { host: "here".to_owned(), program: path, directory: Some(folder.to_owned()), ..Remote::default() }
}

fn run(script: &str) -> std::process::Output {
    Command::new("sh").args(["-c", script]).output().expect("sh")
}

#[test]
fn a_hostfiles_words_are_data_wherever_they_stand() {
    let folder = tempfile::tempdir().expect("a folder");
    let odd = folder.path().join("-rf $(touch x); 'a' \"b\"\nc");
    std::fs::create_dir(&odd).expect("a folder");
    let remote =
        Remote { directory: Some(odd.clone()), ..remote(folder.path(), "pwd -P; printf '%s|' \"$A\" \"$@\"; exit 6") };
    let value = "'; touch y; $HOME `date` !!\n";
    let arguments = ["--set".to_owned(), "data.train=[\"a b\"]".to_owned(), "$(touch z)".to_owned()];
    let output = run(&remote.script(&arguments, &[("A".to_owned(), value.to_owned())]));
    let real = std::fs::canonicalize(&odd).expect("it is there");
    let expected = format!("{}\n{value}|{}|", real.display(), arguments.join("|"));
    assert_eq!(String::from_utf8_lossy(&output.stdout), expected, "{output:?}");
    assert_eq!(output.status.code(), Some(6));
    assert_eq!(std::fs::read_dir(&odd).expect("a list").count(), 0, "nothing was run");
    let nowhere = Remote { directory: Some("/nowhere".into()), ..remote };
    assert_eq!(run(&nowhere.script(&[], &[])).status.code(), Some(2));
}

#[test]
fn ssh_is_told_never_to_make_a_terminal() {
    let remote = Remote { host: "box".to_owned(), config: Some("/a b".into()), ..Remote::default() };
    let command = remote.ssh("true");
    let words: Vec<String> = command.get_args().map(|word| word.to_string_lossy().into_owned()).collect();
    assert_eq!(words[..3], ["-F", "/a b", "-T"]);
    for option in ["RequestTTY=no", "BatchMode=yes", "RemoteCommand=none", "LogLevel=INFO"] {
        assert!(words.contains(&option.to_owned()), "{words:?}");
    }
    assert_eq!(words[words.len() - 3..], ["--", "box", "true"]);
}

/// Also `::1`: the rule is that of [`is_this_host`].
#[test]
fn a_hostfiles_host_is_this_one_or_reached_over_ssh() {
    let remote = Remote { host: "nobody".to_owned(), program: "/bin/finetune".into(), ..Remote::default() };
    for (ssh, local) in [("localhost", true), ("127.0.0.1", true), ("::1", true), ("me@mini-1.invalid", false)] {
        let host = Host { ssh: ssh.to_owned(), ips: Vec::new(), rdma: Vec::new() };
        let expected = Remote { host: ssh.to_owned(), ..remote.clone() };
        let found = WorkerHost::of(&host, &remote);
        assert_eq!(found.remote(), (!local).then_some(&expected), "{ssh}");
    }
}

//! What ssh says (OpenSSH 9, as printed), and the beginning of the hint.

use super::*;

#[test]
fn each_failure_has_a_hint_of_its_own() {
    use Trouble::{Absent, Mistake};
    for (words, trouble, says) in [
        ("root@10.0.0.2: Permission denied (publickey,password).", Mistake, "ssh-copy-id box"),
        ("Host key verification failed.", Mistake, "accept its key: `ssh box`"),
        ("No ED25519 host key is known for box and you have requested strict checking.", Mistake, "accept its key"),
        (
            "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.",
            Mistake,
            "ssh-keygen -R box",
        ),
        ("ssh: Could not resolve hostname box: Name or service not known", Mistake, "is the name right?"),
        ("ssh: connect to host box port 22: Connection refused", Absent, "start sshd there"),
        ("ssh: connect to host box port 22: No route to host", Absent, "no network leads to box"),
        ("ssh: connect to host box port 22: Network is unreachable", Absent, "no network leads to box"),
        ("ssh: connect to host box port 22: Connection timed out", Absent, "box says nothing"),
        ("Connection timed out during banner exchange", Absent, "box says nothing"),
        ("Timeout, server box not responding.", Absent, "box says nothing"),
        ("kex_exchange_identification: read: Connection reset by peer", Absent, "MaxStartups"),
        ("tar: model/model.safetensors: Cannot write: No space left on device", Mistake, "disk of box is full"),
        ("tar: x: Cannot open: Disk quota exceeded", Mistake, "disk of box is full"),
        ("/home/me/.ssh/config: line 3: Bad configuration option: usekeychain", Mistake, "its configuration"),
        ("@ WARNING: UNPROTECTED PRIVATE KEY FILE! @\nroot@box: Permission denied (publickey).", Mistake, "chmod 600"),
        ("Received disconnect from 10.0.0.2 port 22:2: Too many authentication failures", Mistake, "too many keys"),
        ("This account is currently not available.", Mistake, "no login shell"),
        ("sh: 13: /opt/finetune: Exec format error", Mistake, "another system than that of box"),
        ("zsh: bad CPU type in executable: ./finetune", Mistake, "another system than that of box"),
        (
            "./finetune: /lib/x86_64-linux-gnu/libc.so.6: version `GLIBC_2.38' not found (required by ./finetune)",
            Mistake,
            "another system than that of box",
        ),
    ] {
        let (found, hint) = hint("box", words).unwrap_or_else(|| panic!("no hint for {words}"));
        assert!(found == trouble && hint.contains(says), "{words}: {found:?} {hint}");
    }
    // A program's own words are no failure of ssh.
    for words in ["error: recipe.toml: Permission denied (os error 13)", "unknown key `x`", ""] {
        assert_eq!(hint("box", words), None, "{words}");
    }
}

#[test]
fn escapes_are_shown_and_not_obeyed() {
    assert_eq!(shown("a\u{1b}]0;title\u{7}b\tc"), "a\\u{1b}]0;title\\u{7}b\tc");
    assert_eq!(shown("\u{202e}evil ä 語 🙂\r"), "\\u{202e}evil ä 語 🙂\\r");
}

#[test]
fn messages_stay_on_one_line() {
    assert_eq!(one_line("a\r\n\n  b\u{1b}[31m\n"), "a; b[31m");
    assert_eq!(one_line(" \n"), "it said nothing");
    assert!(one_line(&"x".repeat(10_000)).len() <= 300);
}

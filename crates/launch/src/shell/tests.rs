//! The shells at hand must agree on what a line says.

use std::process::Command;

use super::*;

/// Bytes that some shell has its own ideas about.
const WORDS: [&str; 12] = [
    "plain",
    "it's $(here) `there`",
    "-n",
    "a!b !! !y",
    "two\nlines\n\nand a tab\t",
    "back\\slash \\n \\' \\\\",
    "\"double\" 'single' ''",
    "~ * ? [a-z] {b,c}",
    "# comment ; & | > < ( )",
    "%s %b 100%",
    "ä € 語 \u{1b}[31m",
    "$HOME ${HOME} $1 %HOME%",
];

#[test]
fn every_login_shell_reads_a_line_alike() {
    let words: Vec<String> = WORDS.iter().map(|word| quoted(word)).collect();
    let script = format!("printf '%s|' \"$1\" {}; exit 7", words.join(" "));
    let expected = format!("m-1|{}|", WORDS.join("|"));
    let mut tried = Vec::new();
    for shell in ["sh", "dash", "bash", "zsh", "ksh", "mksh", "fish", "tcsh", "csh"] {
        // As sshd does it.
        let Ok(output) = Command::new(shell).args(["-c", &line("m-1", &script)]).output() else { continue };
        assert_eq!(String::from_utf8_lossy(&output.stdout), expected, "{shell}: {output:?}");
        assert_eq!(output.status.code(), Some(7), "{shell}");
        tried.push(shell);
    }
    assert!(tried.contains(&"sh"), "{tried:?}");
    println!("{tried:?} agree");
}

/// A login file may have become another shell, which then reads its commands from standard input.
#[test]
fn a_shell_that_reads_commands_takes_the_line_too() {
    use std::io::Write;
    for shell in ["sh", "bash", "zsh", "ksh", "fish", "tcsh"] {
        let piped = std::process::Stdio::piped;
        let Ok(mut child) = Command::new(shell).stdin(piped()).stdout(piped()).spawn() else { continue };
        let text = format!("{}\n", line("m", "printf '%s' \"it's $((1+1))!\""));
        child.stdin.take().expect("asked for").write_all(text.as_bytes()).expect("it reads");
        let output = child.wait_with_output().expect("a child of ours");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "it's 2!", "{shell}");
    }
}

#[test]
fn words_for_a_shell() {
    assert_eq!(quoted("it's $(here)"), r"'it'\''s $(here)'");
    assert_eq!(path_word(Path::new("-rf x")), "'./-rf x'");
    assert_eq!(path_word(Path::new("/a b")), "'/a b'");
    assert_eq!(octal("a b\n"), "a\\0040b\\0012");
}

//! Logins of every kind, played by the shell at hand.

use super::*;

/// Opens a session whose login file is `login`, and has it run `script`.
fn open(login: &str, script: &str) -> Result<Session, Unanswered> {
    let login = login.to_owned();
    // As sshd: a shell that has read its login file runs the line.
    let run = move |line: &str| {
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("{login}\n{line}")]);
        shell
    };
    Session::open_by(&run, script, &AtomicI32::new(0))
}

/// What it says until its end, and its exit code.
fn answer(mut session: Session) -> (String, i32) {
    let mut said = Vec::new();
    loop {
        match session.next(&AtomicI32::new(0), Duration::from_secs(20), &|| 0).expect("an answer") {
            Next::Output(bytes) => said.extend(bytes),
            Next::Ended(code) => return (String::from_utf8(said).expect("text"), code),
        }
    }
}

#[test]
fn a_command_gets_what_it_is_sent_and_nothing_else() {
    for login in [
        "",
        "echo Welcome; printf 'caf\\351\\n'",
        "sleep 4",
        // Two that are no POSIX shell's: the login has become another shell, or has asked for a
        // line.
        "exec sh",
        "read answer",
    ] {
        let mut session = open(login, "read -r secret; printf '%s!' \"$secret\"; exit 5").expect(login);
        session.say("the secret\n");
        assert_eq!(answer(session), ("the secret!".to_owned(), 5), "{login}");
    }
}

#[test]
fn a_login_that_keeps_its_input_is_told_from_a_slow_one() {
    let error = open("cat > /dev/null", "echo never").map(|_| ()).expect_err("it waits for ever");
    assert!(matches!(error, Unanswered::ReadsInput), "{error}");
    // Without an input the command begins, and ends at once.
    let session = open("exec < /dev/null", "echo never").expect("it has said that it is there");
    let (said, code) = answer(session);
    assert!(said.is_empty() && matches!(ended(code, String::new()), Unanswered::ReadsInput), "{code} {said}");
    assert_eq!(answer(open("sleep 10", "echo there").expect("it is only slow")).0, "there\n");
}

#[test]
fn a_login_that_fails_is_told_with_its_words() {
    for (login, code, says) in [
        ("echo 'no entry' >&2; exit 255", 255, "no entry"),
        ("echo 'This account is currently not available.'; exit 1", 1, "not available"),
        ("exit 0", 0, ""),
    ] {
        match open(login, "echo never").map(|_| ()).expect_err(login) {
            Unanswered::Ssh { words } => assert!(code == 255 && words.contains(says), "{words}"),
            Unanswered::Login { code: found, words } => assert!(code == found && words.contains(says), "{words}"),
            other => panic!("{login}: {other}"),
        }
    }
}

#[test]
fn a_signal_ends_the_wait() {
    let stop = AtomicI32::new(0);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let run = |_: &str| {
                let mut shell = Command::new("sleep");
                shell.arg("600");
                shell
            };
            Session::open_by(&run, "", &stop).map(|_| ())
        });
        std::thread::sleep(Duration::from_millis(100));
        stop.store(15, Ordering::SeqCst);
        let began = Instant::now();
        assert!(matches!(waiting.join().expect("no panic"), Err(Unanswered::Stopped)));
        assert!(began.elapsed() < LOGIN / 2);
    });
}

#[test]
fn the_line_of_the_opening_is_found_in_any_pieces() {
    let text = b"hello\nm-1 is not it\n\nm-1 ready 77\nrest";
    for cut in 0..text.len() {
        let mut greeting = Greeting::new("m-1");
        let found = greeting.push(&text[..cut]);
        let found = found.or_else(|| greeting.push(&text[cut..]));
        let (opened, mut rest) = found.expect("the line is there");
        rest.extend(if cut >= text.len() - 4 { &text[cut..] } else { b"" });
        assert_eq!((opened, rest.as_slice()), (Opened::Ready { process: 77 }, &b"rest"[..]), "cut at {cut}");
    }
    let mut greeting = Greeting::new("m-1");
    assert_eq!(greeting.push(b"m-1 ready x\nm-1 done\n"), None);
    (0..100).for_each(|_| drop(greeting.push(&[b'x'; 10_000])));
    assert!(greeting.heard.len() <= MOST_GREETING);
    assert_eq!(greeting.push(b"\nm-1 terminal\n").map(|(opened, _)| opened), Some(Opened::Terminal));
}

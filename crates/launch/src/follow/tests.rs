use std::io::Write;
use std::process::Command;

use super::*;

fn files(folder: &Path) -> Files<'_> {
    Files {
        folder,
        growing: "rows.jsonl",
        whole: &["facts.json", "it's.txt"],
        lock: ".lock",
        numbered: ("checkpoints", "step-"),
        results: &["adapter"],
    }
}

#[expect(clippy::disallowed_methods, reason = "files of a test need not survive a power cut")]
fn write(path: &Path, text: &str) {
    std::fs::write(path, text).expect("a file");
}

/// The loop in a shell of this machine, as ssh would start it.
fn follow(folder: &Path) -> Follow {
    let mark = new_mark().expect("a mark");
    let script = script(&mark, &files(folder));
    let login = |line: &str| {
        let mut shell = Command::new("sh");
        shell.args(["-c", line]);
        shell
    };
    let session = Session::open_by(&login, &script, &AtomicI32::new(0)).expect("a shell");
    Follow { session, parser: Parser { mark, bytes: Vec::new() } }
}

/// What is seen up to the end of a look.
fn look(follow: &mut Follow) -> Vec<Seen> {
    let mut all = Vec::new();
    loop {
        let seen = follow.next(&AtomicI32::new(0)).expect("something is seen");
        let is_last = matches!(seen, Seen::State { more: false, .. } | Seen::Missing);
        all.push(seen);
        if is_last {
            return all;
        }
    }
}

fn grown(fresh: bool, text: &str) -> Seen {
    Seen::Grown { fresh, bytes: text.as_bytes().to_vec() }
}

fn state(held: Option<bool>, newest: Option<u64>, has_result: bool) -> Seen {
    Seen::State { held, newest, has_result, more: false }
}

#[test]
#[expect(clippy::disallowed_methods, reason = "files of a test need not survive a power cut")]
fn what_changes_is_seen_and_nothing_twice() {
    let temporary = tempfile::tempdir().expect("a directory");
    let folder = temporary.path().join("it's a run");
    std::fs::create_dir_all(folder.join("checkpoints/step-000020")).expect("a directory");
    std::fs::create_dir_all(folder.join("checkpoints/step-000100.tmp-1")).expect("a directory");
    write(&folder.join("rows.jsonl"), "{\"step\":1}\n{\"st");
    write(&folder.join("facts.json"), "{\"a\": \"%s \\\\ é\"}\n");
    write(&folder.join(".lock"), &format!("{} {}\n", std::process::id(), finetune_rendezvous::own_name()));
    let mut follow = follow(&folder);
    let facts = Seen::Whole { file: 0, bytes: "{\"a\": \"%s \\\\ é\"}\n".as_bytes().to_vec() };
    let mut first = look(&mut follow);
    // The name in a lock is the kernel's; where that is another than ours, the host is unknown.
    assert!(matches!(
        first.pop(),
        Some(Seen::State { held: None | Some(true), newest: Some(20), has_result: false, .. })
    ));
    assert_eq!(first, [facts, grown(true, "{\"step\":1}\n{\"st")]);
    let mut file = std::fs::OpenOptions::new().append(true).open(folder.join("rows.jsonl")).expect("a file");
    file.write_all(b"ep\":2}\n").expect("written");
    write(&folder.join(".lock"), "");
    write(&folder.join("it's.txt"), "x");
    std::fs::create_dir(folder.join("adapter")).expect("a directory");
    // The loop may be in the middle of a look.
    let mut seen = [look(&mut follow), look(&mut follow)].concat();
    assert_eq!(seen.pop(), Some(state(Some(false), Some(20), true)));
    let rows: Vec<&Seen> = seen.iter().filter(|seen| matches!(seen, Seen::Grown { .. })).collect();
    assert_eq!(rows, [&grown(false, "ep\":2}\n")]);
    assert!(seen.contains(&Seen::Whole { file: 1, bytes: b"x".to_vec() }));
    // A resume writes the file anew under the same name.
    write(&folder.join("new"), "{\"step\":1}\n");
    std::fs::rename(folder.join("new"), folder.join("rows.jsonl")).expect("renamed");
    let seen = [look(&mut follow), look(&mut follow)].concat();
    assert!(seen.contains(&grown(true, "{\"step\":1}\n")), "{seen:?}");
}

#[test]
fn long_files_come_in_pieces() {
    let temporary = tempfile::tempdir().expect("a directory");
    let text = "0123456789abcde\n".repeat(200_000);
    write(&temporary.path().join("rows.jsonl"), &text);
    let seen = look(&mut follow(temporary.path()));
    let pieces: Vec<u8> = seen
        .iter()
        .flat_map(|seen| if let Seen::Grown { bytes, .. } = seen { bytes.clone() } else { Vec::new() })
        .collect();
    assert_eq!(pieces.len(), text.len());
    assert!(pieces == text.as_bytes());
}

#[test]
fn a_folder_that_is_not_there() {
    for folder in ["/nowhere/at/all", "nowhere", "~/nowhere"] {
        assert_eq!(look(&mut follow(Path::new(folder))), [Seen::Missing], "{folder}");
    }
}

#[test]
fn other_output_is_passed_over() {
    let mut parser = Parser { mark: "mark".to_owned(), bytes: Vec::new() };
    let mut all = Vec::new();
    for piece in
        ["Welcome!\nmark grown 1 ", "3\na\n", "b", "mark what\nmark state 0 0 0 \n", "mark state 1 1 0 000007\n"]
    {
        parser.bytes.extend_from_slice(piece.as_bytes());
        all.extend(std::iter::from_fn(|| parser.next()));
    }
    assert_eq!(all, [grown(true, "a\nb"), state(Some(false), None, false), state(Some(true), Some(7), true)]);
}

#[test]
fn folders_below_the_home_directory() {
    let of = |folder: &str| script("m", &files(Path::new(folder)));
    assert!(of("~/runs/a").contains("CDPATH= cd -- 'runs/a'"));
    assert!(of("~/runs/a").starts_with("cd || exit 2\n") && of("runs/a").starts_with("cd || exit 2\n"));
    assert!(!of("/runs/a").starts_with("cd || exit 2\n"));
    assert!(of("~").contains("\ncd >/dev/null"));
}

//! What goes into a copy, and what may come back.

use std::os::unix::fs::symlink;

use super::*;

static GO: AtomicI32 = AtomicI32::new(0);

fn write(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
    let mut file = File::options().create(true).truncate(true).write(true).open(path).expect("a file");
    file.write_all(text.as_bytes()).expect("written");
}

fn names(from: &Path) -> Result<Vec<String>, CopyError> {
    let file = BundleFile { from: from.to_owned(), to: "model".to_owned() };
    let bundle = Bundle::pack("folder", &[file], &GO)?;
    Ok(bundle.items.into_iter().map(|item| item.name).collect())
}

#[test]
fn links_are_followed_within_the_folder_and_into_the_cache_that_it_is_part_of() {
    let folder = tempfile::tempdir().expect("a folder");
    let root = std::fs::canonicalize(folder.path()).expect("it is there");
    let snapshot = root.join("models--a--b/snapshots/0123");
    write(&snapshot.join("config.json"), "{}");
    write(&root.join("models--a--b/blobs/4567"), "weights");
    symlink("../../blobs/4567", snapshot.join("model.safetensors")).expect("a link");
    symlink("config.json", snapshot.join("same.json")).expect("a link");
    assert_eq!(names(&snapshot).unwrap(), ["model/config.json", "model/model.safetensors", "model/same.json"]);
    // The folder itself may be named by a link.
    symlink(&snapshot, root.join("model")).expect("a link");
    assert_eq!(names(&root.join("model")).unwrap().len(), 3);

    write(&root.join("secret"), "a key");
    symlink(root.join("secret"), snapshot.join("chat_template.jinja")).expect("a link");
    let error = names(&snapshot).expect_err("it leads out").to_string();
    assert!(error.contains("chat_template.jinja is a link to") && error.contains("secret"), "{error}");
    std::fs::remove_file(snapshot.join("chat_template.jinja")).expect("gone");
    symlink(".", snapshot.join("again")).expect("a link");
    assert!(names(&snapshot).expect_err("a circle").to_string().contains("more folders in folders"));
}

#[test]
fn odd_names_are_named_and_not_sent() {
    let folder = tempfile::tempdir().expect("a folder");
    write(&folder.path().join("two\nlines"), "");
    assert!(names(folder.path()).expect_err("an odd name").to_string().contains("no plain text"));
    assert!(matches!(names(&folder.path().join("none")), Err(CopyError::Read { .. })));
}

#[test]
fn a_copy_has_one_place_whatever_is_in_it() {
    assert_eq!(folder("support bot", "here /runs/a"), folder("support bot", "here /runs/a"));
    assert_ne!(folder("a", "here /runs/a"), folder("a", "there /runs/a"));
    let odd = folder("--rf $(x)/..", "x");
    assert!(odd.starts_with(".cache/finetune/launch/rf___x____-"), "{odd}");
}

#[test]
fn what_comes_back_stays_in_its_folder() {
    let received = |name: &[u8], kind: tar::EntryType| {
        let mut header = header(3, 0o600);
        header.set_entry_type(kind);
        header.as_gnu_mut().expect("its kind").name[..name.len()].copy_from_slice(name);
        header.set_cksum();
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend(b"abc");
        bytes.resize(3 * 512, 0);
        let mut names = Vec::new();
        let unpacked = unpack(&mut bytes.as_slice(), &mut |name, bytes| {
            names.push(name.to_owned());
            io::copy(bytes, &mut io::sink()).map(|_| ())
        });
        unpacked.map(|()| names)
    };
    assert_eq!(received(b"./checkpoints/step-1/a", tar::EntryType::Regular).unwrap(), ["checkpoints/step-1/a"]);
    for (name, kind) in [
        (&b"../a"[..], tar::EntryType::Regular),
        (b"/etc/a", tar::EntryType::Regular),
        (b"a/../../b", tar::EntryType::Regular),
        (b"a", tar::EntryType::Symlink),
        (b"a", tar::EntryType::Fifo),
        (b"a\x1b[31m", tar::EntryType::Regular),
    ] {
        assert!(received(name, kind).is_err(), "{:?} {kind:?}", String::from_utf8_lossy(name));
    }
}

#[test]
fn an_archive_holds_the_files_for_the_user_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("rows");
    write(&path, "some rows");
    let long = format!("train/0/{}", "x".repeat(200));
    let files = [Sent { name: "finetune", path: &path, bytes: 9 }, Sent { name: &long, path: &path, bytes: 9 }];
    let (mut bytes, moved) = (Vec::new(), AtomicU64::new(0));
    write_archive(Counted { to: &mut bytes, moved: &moved }, &files, &[("manifest.new", "text")]).expect("written");
    assert_eq!(moved.into_inner(), bytes.len() as u64);
    let mut archive = tar::Archive::new(bytes.as_slice());
    let entries: Vec<(String, u32)> = archive
        .entries()
        .expect("an archive")
        .map(|entry| {
            let entry = entry.expect("an entry");
            (entry.path().expect("a name").display().to_string(), entry.header().mode().expect("a mode"))
        })
        .collect();
    assert_eq!(entries, [("finetune".into(), 0o700), (long, 0o600), ("manifest.new".into(), 0o600)]);
}

use std::path::Path;

use finetune_advice::Advice as _;

use super::*;

fn write(path: &Path, bytes: &[u8]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    crate::replace_file(&crate::RealDisk, path, bytes).unwrap();
}

#[test]
fn archives_and_what_comes_out_of_packed_files() {
    let mut tar = b"train.jsonl".to_vec();
    tar.resize(257, 0);
    tar.extend(b"ustar\x0000");
    let cases: [(&str, &[u8], Holding); 8] = [
        ("rows.parquet", b"PARE\x15\x04", Holding::Parquet),
        ("rows.xlsx", b"PK\x03\x04\x14\0[Content_Types].xml", Holding::Spreadsheet),
        ("rows.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", Holding::Spreadsheet),
        ("rows.jsonl.bz2", b"BZh91AY&SY", Holding::OtherPacked),
        ("rows.jsonl.xz", b"\xfd7zXZ\0\0", Holding::OtherPacked),
        ("rows.tar", &tar, Holding::Tar),
        ("rows.csv", b"prompt,completion\n", Holding::Csv),
        ("rows", b"", Holding::EmptyFile),
    ];
    for (name, bytes, want) in cases {
        assert_eq!(recognize_content(Path::new(name), bytes), want, "{name}");
    }
}

/// Others than root may not read every file that they see.
#[test]
fn a_file_that_cannot_be_read_is_known_by_its_name() {
    for (name, want) in [
        ("recipe.toml", Holding::Recipe),
        ("rows.jsonl", Holding::JsonLines),
        ("rows.csv", Holding::Csv),
        ("lora.yml", Holding::Yaml),
    ] {
        assert_eq!(file::recognize(Path::new(name), b""), want, "{name}");
    }
}

/// (name, bytes, what it is)
#[test]
fn files_are_known_by_their_first_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let mut utf16 = vec![0xff, 0xfe];
    utf16.extend("{\"text\": \"Hi\"}".encode_utf16().flat_map(u16::to_le_bytes));
    let bare_utf16: Vec<u8> = "{\"text\": \"Hi\"}".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let mut safetensors = 20u64.to_le_bytes().to_vec();
    safetensors.extend(b"{\"__metadata__\":{}} ");
    let long_row = format!("{{\"text\": \"{}\"}}", "word ".repeat(2000));
    let cases: [(&str, &[u8], Holding); 47] = [
        ("model.safetensors", &safetensors, Holding::Safetensors),
        // The length of its header begins as a pickle does.
        ("other.safetensors", b"\x80\x02\0\0\0\0\0\0{", Holding::Safetensors),
        (
            "model.safetensors",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
            Holding::LfsPointer,
        ),
        ("tokenizer.json", b"<!DOCTYPE html>\n<html><body>Access denied</body></html>", Holding::Html),
        ("tokenizer.json", b"{\n  \"version\": \"1.0\"\n}", Holding::JsonObject),
        ("tokenizer.model", b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02", Holding::SentencePiece),
        ("weights", b"GGUF\x03\0\0\0", Holding::Gguf),
        ("rows.jsonl.gz", b"\x1f\x8b\x08\0", Holding::Gzip),
        ("rows.jsonl", b"\x28\xb5\x2f\xfd\0", Holding::Zstd),
        ("rows.jsonl", b"PAR1\x15\x04", Holding::Parquet),
        ("data-00000-of-00001.arrow", b"\xff\xff\xff\xff\x10\x02\0\0", Holding::Arrow),
        ("file", b"ARROW1\0\0", Holding::Arrow),
        ("rows.zip", b"PK\x03\x04\x14\0rows.jsonl", Holding::Zip),
        ("pytorch_model.bin", b"PK\x03\x04\0\0archive/x", Holding::Pickle),
        ("model", b"PK\x03\x04\0\0archive/data.pkl", Holding::Pickle),
        ("old.pt", b"\x80\x02\x8a\x0a", Holding::Pickle),
        ("rows.jsonl", &utf16, Holding::Utf16),
        ("rows.jsonl", &bare_utf16, Holding::Utf16),
        ("rows.jsonl", b"\xff\xfe\0\0{\0\0\0", Holding::Utf32),
        ("rows.jsonl", b"\0\0\xfe\xff\0\0\0{", Holding::Utf32),
        ("rows.jsonl.bz2", b"BZh11AY&SY\0\0", Holding::OtherPacked),
        ("rows.jsonl", b"", Holding::EmptyFile),
        ("rows.jsonl", b"{\"text\": \"a\"}\n{\"text\": \"b\"}\n", Holding::JsonLines),
        ("rows.json", b"{\"text\": \"a\"}\n{\"text\": \"b\"}\n", Holding::JsonLines),
        ("rows.json", b"{\"text\": \"a\"}\n", Holding::JsonObject),
        ("rows.jsonl", b"\xef\xbb\xbf{\"text\": \"a\"}\n", Holding::JsonLines),
        ("rows.jsonl", long_row.as_bytes(), Holding::JsonLines),
        ("rows.jsonl", b"{\"text\": \"a\"\n{\"text\": \"b\"}\n", Holding::JsonLines),
        ("rows", b"{\"text\": \"a\"}\n", Holding::JsonLines),
        ("rows.json", b"[{\"instruction\": \"Hi\"}]", Holding::JsonArray),
        ("rows.jsonl", b"[\n  {\"instruction\": \"Hi\"}\n]", Holding::JsonArray),
        ("rows.json", b"[\"a\", \"b\"]", Holding::JsonArray),
        ("rows.csv", b"prompt,completion\nHi,Hello\n", Holding::Csv),
        ("rows.txt", b"prompt,completion\nHi,Hello\n", Holding::Csv),
        ("rows.csv", b"prompt,completion\nCaf\xe9,Hello\n", Holding::Csv),
        ("rows.tsv", b"prompt\tcompletion\n", Holding::Tsv),
        ("recipe.toml", b"# mine\noutput_dir = \"run\"\n[model]\n", Holding::Recipe),
        ("recipe", b"[model] # first\npath = \"x\"\n", Holding::Recipe),
        ("recipe.toml", b"", Holding::EmptyFile),
        ("recipe.toml", b"[model\npath = 1\n", Holding::Recipe),
        ("axolotl.yml", b"base_model: acme/tiny\n", Holding::Yaml),
        ("axolotl.toml", b"# from a colleague\nbase_model: acme/tiny\nadapter: lora\n", Holding::Yaml),
        ("config", b"---\nmodel:\n  _component_: x\n", Holding::Yaml),
        ("chat.jinja", b"{% for message in messages %}", Holding::Jinja),
        ("template", b"{{- bos_token }}", Holding::Jinja),
        ("notes.txt", b"Note: the first line of a letter.\nIt goes on.\n", Holding::Text),
        ("notes", b"\x00\x01\x02\x03\x00\x05", Holding::Binary),
    ];
    for (n, (name, bytes, want)) in cases.into_iter().enumerate() {
        let path = directory.path().join(n.to_string()).join(name);
        write(&path, bytes);
        let found = recognize(&path);
        assert_eq!(found, want, "{name}: {:?}", String::from_utf8_lossy(&bytes[..bytes.len().min(40)]));
        assert!(!found.describe().is_empty());
    }
}

/// (files, what the directory is)
#[test]
fn directories_are_known_by_what_they_have() {
    let directory = tempfile::tempdir().unwrap();
    let manifest = "manifest.json";
    let cases: [(&[&str], Holding); 20] = [
        (&["config.json", "model.safetensors"], Holding::ModelDirectory),
        (&["config.json"], Holding::ModelDirectory),
        (&["pytorch_model.bin"], Holding::ModelDirectory),
        (&["config.json", "model.safetensors", "adapter_config.json"], Holding::ModelDirectory),
        (&["adapter_config.json", "adapter_model.safetensors", "README.md"], Holding::Adapter),
        (&["config.json", "adapter_config.json", "adapter_model.safetensors"], Holding::Adapter),
        (&["adapter_config.json", "adapters.safetensors"], Holding::Adapter),
        (&["adapter_config.json", "optimizer.safetensors", "trainer_state.json", manifest], Holding::Checkpoint),
        (&["config.json", "model.safetensors", "optimizer.safetensors", "trainer_state.json"], Holding::Checkpoint),
        // transformers' own trainer leaves checkpoints too.
        (&["adapter_config.json", "adapter_model.safetensors", "trainer_state.json", "optimizer.pt"], Holding::Adapter),
        (&["recipe.toml", "metrics.jsonl"], Holding::Run),
        (&["checkpoints/step-000010/trainer_state.json"], Holding::Run),
        (&["recipe.toml", "adapter/adapter_config.json"], Holding::Run),
        (&["recipe.toml", "model/config.json", "train.jsonl"], Holding::Directory),
        (&["checkpoints/epoch-1.pt"], Holding::Directory),
        (&["tiny-q4.gguf"], Holding::Gguf),
        (&["tiny-q4.gguf", "config.json"], Holding::Gguf),
        (&["exported.gguf/model-f16.gguf"], Holding::Directory),
        (&["tiny-q4.gguf", "config.json", "model.safetensors"], Holding::ModelDirectory),
        (&[".DS_Store"], Holding::EmptyDirectory),
    ];
    for (n, (files, want)) in cases.into_iter().enumerate() {
        let path = directory.path().join(n.to_string());
        for name in files {
            write(&path.join(name), b"{}");
        }
        assert_eq!(recognize(&path), want, "{files:?}");
    }
    assert_eq!(recognize(&directory.path().join("none")), Holding::Missing);
    std::fs::create_dir_all(directory.path().join("new/checkpoints")).unwrap();
    assert_eq!(recognize(&directory.path().join("new")), Holding::Run, "a run that has not saved yet");
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("nowhere", directory.path().join("link")).unwrap();
        assert_eq!(recognize(&directory.path().join("link")), Holding::Missing);
    }
}

#[test]
fn a_stand_in_is_named() {
    let directory = tempfile::tempdir().unwrap();
    write(&directory.path().join("config.json"), b"{}");
    write(&directory.path().join("notes.txt"), b"");
    refuse_stand_ins(directory.path()).unwrap();
    let pointer = b"version https://git-lfs.github.com/spec/v1\n".as_slice();
    for (name, bytes, says) in [
        ("model-00001-of-00002.safetensors", pointer, "git lfs pull"),
        ("tokenizer.json", b"<html>".as_slice(), "hf auth login"),
        ("adapter_model.safetensors", b"".as_slice(), "fetch it again"),
    ] {
        let path = directory.path().join(name);
        write(&path, bytes);
        let error = refuse_stand_ins(directory.path()).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
        assert!(error.hints().join(" ").contains(says), "{:?}", error.hints());
        std::fs::remove_file(&path).unwrap();
    }
}

#[cfg(unix)]
#[test]
fn links_may_lead_inside_and_into_the_cache() {
    use std::os::unix::fs::symlink;
    let outside = tempfile::tempdir().unwrap();
    let repository = outside.path().join("models--acme--tiny");
    let snapshot = repository.join("snapshots/abc");
    write(&repository.join("blobs/0123"), b"{}");
    write(&snapshot.join("vocab.json"), b"{}");
    symlink("../../blobs/0123", snapshot.join("config.json")).unwrap();
    symlink("vocab.json", snapshot.join("other.json")).unwrap();
    symlink("nowhere", snapshot.join("dangling.json")).unwrap();
    refuse_links_out(&snapshot).unwrap();
    // The directory itself may be a link.
    symlink(&snapshot, outside.path().join("model")).unwrap();
    refuse_links_out(&outside.path().join("model")).unwrap();

    write(&outside.path().join("id_rsa"), b"secret");
    symlink(outside.path().join("id_rsa"), snapshot.join("chat_template.jinja")).unwrap();
    let error = refuse_links_out(&snapshot).unwrap_err();
    assert!(matches!(error, StoreError::LinkOut { .. }), "{error}");
    assert!(error.to_string().contains("chat_template.jinja"), "{error}");
}

//! The same rows in every kind of file, packed and not, and files of every kind that are torn.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use finetune_advice::Advice as _;
use finetune_dataset::{Dataset, DatasetError, resolve_files};
use finetune_recipe::{Data, Format};
use serde_json::Value;

use crate::made_up::{CHATML, Model, VOCABULARY, data};

/// A file that another program wrote (`scripts/make_data_fixtures.py`).
fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn load(model: &Model, file: &Path) -> Result<Dataset, DatasetError> {
    load_with(model, file, &data(Format::Auto))
}

fn load_with(model: &Model, file: &Path, data: &Data) -> Result<Dataset, DatasetError> {
    let file = std::slice::from_ref(&file.to_owned()).to_vec();
    Dataset::load(&file, data, &model.tokenizer(), VOCABULARY, usize::MAX, &|_| {})
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    packed.write_all(bytes).expect("memory can be written");
    packed.finish().expect("memory can be written")
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::stream::encode_all(bytes, 3).expect("memory can be written")
}

fn objects(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).expect("a row")).collect()
}

/// A table of the values of rows under the names of their keys. A value that is no text is JSON.
fn table(rows: &[Value], separator: &str) -> String {
    let names: Vec<&String> = rows[0].as_object().expect("a row").keys().collect();
    let cell = |value: &Value| {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        format!("\"{}\"", text.replace('"', "\"\""))
    };
    let line = |row: &Value| names.iter().map(|name| cell(&row[name.as_str()])).collect::<Vec<_>>().join(separator);
    let header = names.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(separator);
    [header].into_iter().chain(rows.iter().map(line)).collect::<Vec<_>>().join("\r\n")
}

/// Files with the rows of a JSONL file: name, content.
fn written(lines: &str) -> Vec<(String, Vec<u8>)> {
    let rows = objects(lines);
    let pretty = serde_json::to_string_pretty(&rows).expect("rows");
    let plain = [
        ("rows.jsonl", lines.to_owned()),
        ("windows.jsonl", format!("\u{FEFF}{}", lines.replace('\n', "\r\n"))),
        ("rows.json", serde_json::to_string(&rows).expect("rows")),
        ("pretty.json", pretty.clone()),
        // The first bytes count, not the name.
        ("array.jsonl", pretty),
        ("rows.csv", table(&rows, ",")),
        ("mark.csv", format!("\u{FEFF}{}\r\n\r\n", table(&rows, ","))),
        ("semicolon.csv", table(&rows, ";")),
        ("rows.tsv", table(&rows, "\t")),
        ("tabs.csv", table(&rows, "\t")),
    ];
    let mut files = Vec::new();
    for (name, text) in plain {
        files.push((format!("{name}.gz"), gzip(text.as_bytes())));
        files.push((format!("{name}.zst"), zstd(text.as_bytes())));
        files.push((name.to_owned(), text.into_bytes()));
    }
    files
}

#[test]
fn the_same_rows_in_every_kind_of_file_give_the_same_tokens() {
    let model = Model::new(Some(CHATML));
    for (lines, parquet) in [
        (
            "plain.jsonl",
            &[
                "plain.parquet",
                "plain-none.parquet",
                "plain-gzip.parquet",
                "plain-zstd.parquet",
                "plain-brotli.parquet",
                "plain-lz4.parquet",
                "plain-binary.parquet",
            ][..],
        ),
        ("chats.jsonl", &["chats.parquet"]),
    ] {
        let expected = load(&model, &fixture(lines)).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(expected.rows.len(), 3);
        let text = std::fs::read_to_string(fixture(lines)).expect("a fixture");
        let written = written(&text).into_iter().map(|(name, bytes)| model.write(&name, bytes));
        for file in written.chain(parquet.iter().map(|name| fixture(name))) {
            let found = load(&model, &file).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(found.digest, expected.digest, "{}", file.display());
            let texts = |dataset: &Dataset| {
                dataset.rows.iter().map(|row| (row.prompt_text.clone(), row.answer_text.clone())).collect::<Vec<_>>()
            };
            assert_eq!(texts(&found), texts(&expected), "{}", file.display());
            assert_eq!(found.counts, expected.counts, "{}", file.display());
            resolve_files(&[file], &[]).unwrap_or_else(|error| panic!("{error}"));
        }
    }
}

#[test]
fn origins_name_the_line_or_the_row() {
    let model = Model::new(Some(CHATML));
    let text = std::fs::read_to_string(fixture("plain.jsonl")).expect("a fixture");
    let rows = objects(&text);
    let pretty = serde_json::to_string_pretty(&rows).expect("rows");
    for (file, expected) in [
        (model.write("a.jsonl.gz", gzip(text.as_bytes())), "a.jsonl.gz:3"),
        (model.write("a.json", pretty), "a.json:10 (row 3)"),
        // The second row has a line break within its quotes.
        (model.write("a.csv", table(&rows, ",")), "a.csv:5"),
        (fixture("plain.parquet"), "plain.parquet:row 3"),
    ] {
        let dataset = load(&model, &file).unwrap_or_else(|error| panic!("{error}"));
        assert!(dataset.origin(2).ends_with(expected), "{}", dataset.origin(2));
    }
}

#[test]
fn wrong_rows_are_named_with_their_place() {
    let model = Model::new(Some(CHATML));
    for (name, content, expected) in [
        ("a.json", "[{\"text\": \"a\"},\n {\"text\": 1}]", "a.json:2 (row 2): text is a number; expected a string"),
        ("a.json", "[\n{\"text\": \"a\"},\n{\"text\":\n \"b\",}]", "a.json:4:6 (row 2): not JSON: trailing comma"),
        ("a.json", "[{\"text\": \"a\"}, {\"text\": \"b\",}]", "a.json:1:30 (row 2): not JSON: trailing comma"),
        ("a.json", "[{\"text\": \"a\"}, 7]", "a.json:1 (row 2): the item is a number; expected a list of JSON objects"),
        ("a.json", "[{\"text\": \"a\"},\n{\"te", "a.json:2:4 (row 2): not JSON: EOF while parsing a string"),
        ("a.json", "[{\"text\": \"a\"}\n", "a.json:2 (row 2): the list is not closed: the file ends here"),
        ("a.csv", "text\na\n\"b\nc\n", "a.csv:3: a quote is opened and not closed"),
        ("a.csv", "prompt,completion\na,b\n\nc\n", "a.csv:4: 1 cells, and the header has 2"),
        ("a.csv", "question,answer\na,b\n", "a.csv:2: no key that tells the format; its keys are question, answer"),
        (
            "a.csv",
            "messages\n\"[{\"\"role\"\": \"\"user\"\"\"\n",
            "a.csv:2: messages is a string that is not JSON: EOF while parsing an object",
        ),
        (
            "a.csv",
            "messages,id\n\"[{'role': 'user', 'content': 'a'}]\",1\n",
            "a.csv:2: messages is a list as Python writes it, which is no JSON; expected JSON, as json.dumps writes it",
        ),
        ("a.csv", "text,text\na,b\n", "a.csv:1: the header cannot be used: two columns are called \"text\""),
        ("a.csv", "prompt,completion\n", "no rows in "),
    ] {
        let file = model.write(name, content);
        let told = load(&model, &file).expect_err("a wrong row").to_string();
        assert!(told.contains(expected), "{content:?}\n{told}");
        let packed = model.write(&format!("{name}.gz"), gzip(content.as_bytes()));
        let told = load(&model, &packed).expect_err("a wrong row").to_string();
        assert!(told.contains(&expected.replace("a.json", "a.json.gz").replace("a.csv", "a.csv.gz")), "{told}");
    }
    // sed counts the lines of the file itself only.
    let rows = "{\"text\": \"a\"}\n".repeat(20) + "{\"text\": 1}\n";
    let hints = |file: &Path| load(&model, file).expect_err("a wrong row").hints().join(" ");
    assert!(hints(&model.write("b.jsonl", &rows)).contains("sed '21d'"));
    assert!(!hints(&model.write("b.jsonl.gz", gzip(rows.as_bytes()))).contains("sed"));
}

#[test]
fn values_of_columns_become_what_people_expect() {
    let model = Model::new(Some(CHATML));
    let typed = |columns: &[(&str, &str)]| {
        let columns = columns.iter().map(|(key, name)| ((*key).to_owned(), (*name).to_owned())).collect();
        let data = Data { columns, max_rows: Some(1), ..data(Format::Auto) };
        let dataset = load_with(&model, &fixture("typed.parquet"), &data).unwrap_or_else(|error| panic!("{error}"));
        (dataset.rows[0].prompt_text.clone(), dataset.rows[0].answer_text.clone())
    };
    let texts = |prompt: &str, answer: &str| (prompt.to_owned(), answer.to_owned());
    assert_eq!(typed(&[]), texts("9223372036854775807", "1.5"));
    assert_eq!(typed(&[("prompt", "large"), ("completion", "day")]), texts("18446744073709551615", "2026-11-27"));
    let (number, time) = typed(&[("prompt", "amount"), ("completion", "moment")]);
    assert_eq!(number, "1234567890123456789.25");
    assert!(time.starts_with("2026-11-27 10:30:00"), "{time}");
    // A number that is not finite, and a value that is missing, are no text.
    let told = load(&model, &fixture("typed.parquet")).expect_err("wrong rows").to_string();
    assert!(told.contains("typed.parquet:row 2: completion is null"), "{told}");
    assert!(told.contains("typed.parquet:row 3: prompt is null"), "{told}");
}

#[test]
fn torn_and_hostile_files_are_refused_by_name() {
    let model = Model::new(Some(CHATML));
    let rows = "{\"text\": \"some words of a row\"}\n".repeat(5000);
    let (gz, zst) = (gzip(rows.as_bytes()), zstd(rows.as_bytes()));
    let parquet = std::fs::read(fixture("plain.parquet")).expect("a fixture");
    let mut flipped = parquet.clone();
    flipped[30..90].fill(0xEE);
    let mut footer = parquet.clone();
    let end = footer.len();
    footer[end - 60..end - 12].fill(0x7F);
    let mut encrypted = parquet.clone();
    encrypted[..4].copy_from_slice(b"PARE");
    encrypted[end - 4..].copy_from_slice(b"PARE");
    let twice = gzip(&gzip(b"{}"));
    for (name, content, expected) in [
        ("a.jsonl.gz", &gz[..gz.len() / 2], "a.jsonl.gz: the gzip file is torn or damaged"),
        ("a.jsonl.zst", &zst[..zst.len() / 2], "a.jsonl.zst: the zstd file is torn or damaged"),
        ("a.parquet", &parquet[..parquet.len() / 2], "a.parquet: the Parquet file is torn or damaged: it does not end"),
        ("a.parquet", &parquet[..6], "a.parquet: the Parquet file is torn or damaged"),
        ("a.parquet", b"not one", "a.parquet: the Parquet file is torn or damaged: it does not begin as one"),
        ("a.parquet", &flipped, "a.parquet"),
        ("a.parquet", &footer, "a.parquet"),
        ("a.parquet", &encrypted, "a.parquet is an encrypted Parquet file"),
        ("a.parquet.gz", &gzip(&parquet), "a.parquet.gz is a Parquet file that was packed once more"),
        ("a.jsonl.gz", &twice, "a.jsonl.gz is packed twice"),
    ] {
        let file = model.write(name, content);
        let error = load(&model, &file).expect_err("a torn file");
        assert!(error.to_string().contains(expected) && !error.to_string().contains('\n'), "{name}: {error}");
        assert!(!error.hints().is_empty(), "{error}");
    }
    for length in (8..parquet.len()).step_by(7) {
        let mut torn = parquet[..length].to_vec();
        torn.extend(b"PAR1");
        assert!(load(&model, &model.write("torn.parquet", torn)).is_err(), "{length}");
    }
}

#[test]
fn a_row_that_unpacks_to_too_much_is_refused_and_not_kept() {
    let model = Model::new(Some(CHATML));
    let long = format!("{{\"text\": \"{}\"}}\n{{\"text\": \"b\"}}\n", "a".repeat(20 << 20));
    for (name, content) in [
        ("long.jsonl.gz", gzip(long.as_bytes())),
        ("long.json.gz", gzip(format!("[{}]", long.trim_end().replace('\n', ",")).as_bytes())),
        ("long.csv.zst", zstd(format!("text\n{}\nb\n", "a".repeat(20 << 20)).as_bytes())),
    ] {
        let told = load(&model, &model.write(name, content)).expect_err("a long row").to_string();
        assert!(told.starts_with("1 row cannot be used") && told.contains("is longer than 16 MiB"), "{told}");
    }
    let told = load(&model, &fixture("bomb.parquet")).expect_err("a long row").to_string();
    assert!(told.contains("bomb.parquet:row 1: the row is longer than 16 MiB"), "{told}");
    // A gigabyte of one letter, in about a megabyte: its end is not waited for.
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let piece = vec![b'a'; 1 << 20];
    (0..1024).for_each(|_| packed.write_all(&piece).expect("memory can be written"));
    let bomb = packed.finish().expect("memory can be written");
    for name in ["bomb.jsonl.gz", "bomb.csv.gz"] {
        let told = load(&model, &model.write(name, &bomb)).expect_err("a bomb").to_string();
        assert!(told.contains(name) && told.contains("has not ended after 256 MiB"), "{told}");
    }
}

#[test]
fn patterns_and_directories_stand_for_files() {
    let model = Model::new(Some(CHATML));
    let path = |name: &str| model.path().join(name);
    let row = |text: &str| format!("{{\"text\": \"{text}\"}}\n");
    model.write("b.jsonl", row("b"));
    model.write("a.jsonl", row("a"));
    model.write("c.csv", "text\nc\n");
    let files = |entry: &str| match resolve_files(&[path(entry)], &[]) {
        Ok((files, _)) => files
            .iter()
            .map(|file| file.file_name().expect("a name").to_string_lossy().into_owned())
            .collect::<Vec<_>>()
            .join(" "),
        Err(error) => error.to_string().replace(&model.path().display().to_string(), "d"),
    };
    assert_eq!(files("*.jsonl"), "a.jsonl b.jsonl");
    assert_eq!(files("[bc].*"), "b.jsonl c.csv");
    assert_eq!(files("*.parquet"), "d/*.parquet: no file has such a name");
    assert!(files("a**.jsonl").contains("d/a**.jsonl: "), "{}", files("a**.jsonl"));
    for folder in ["deep/er", "deep/.hidden"] {
        std::fs::create_dir_all(path(folder)).expect("a folder");
    }
    model.write("deep/er/d.jsonl", row("d"));
    model.write("deep/.hidden/e.jsonl", row("e"));
    #[cfg(unix)]
    std::os::unix::fs::symlink(model.path().join("deep"), path("deep/er/back")).expect("a link");
    assert_eq!(files("deep/**/*.jsonl"), "d.jsonl", "a link that leads back is not followed");
    assert_eq!(files("**/d.jsonl"), "d.jsonl");
    assert_eq!(files("deep/er/**/d.jsonl"), "d.jsonl");
    // A name with the characters of a pattern is a name, if there is such a file.
    model.write("x[1].jsonl", row("x"));
    assert_eq!(files("x[1].jsonl"), "x[1].jsonl");
    let hub = resolve_files(&[PathBuf::from("hf://acme/rows/train")], &[]).expect_err("nobody fetched it");
    assert_eq!(hub.to_string(), "hf://acme/rows/train is a data set of the hub, and was not fetched");
    assert!(hub.hints()[0].contains("acme/rows"), "{:?}", hub.hints());
    model.write("train-00001-of-00002.csv", "text\nd\n");
    model.write("train-00000-of-00002.jsonl.gz", gzip(row("c").as_bytes()));
    model.write("valid.csv.zst", zstd(b"text\nd\n"));
    let (train, eval) = resolve_files(&[model.path().to_owned()], &[]).expect("files");
    assert_eq!((train.len(), eval.len()), (2, 1));
    let dataset = Dataset::load(&train, &data(Format::Auto), &model.tokenizer(), VOCABULARY, 9, &|_| {}).expect("rows");
    assert_eq!(dataset.rows.iter().map(|row| row.answer_text.as_str()).collect::<Vec<_>>(), ["c", "d"]);
}

/// A pipe with a name, and a program that writes to it a while later.
#[cfg(unix)]
#[test]
fn rows_of_a_pipe_are_read_once_its_writer_comes() {
    let model = Model::new(Some(CHATML));
    let rows = std::fs::read(fixture("chats.jsonl")).expect("rows");
    let pipe = model.path().join("rows.pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().expect("mkfifo").success());
    let path = pipe.clone();
    let writer = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(300));
        let mut file = std::fs::OpenOptions::new().write(true).open(path).expect("a reader");
        file.write_all(&rows).expect("written");
    });
    let (files, _) = resolve_files(&[pipe], &[]).expect("the pipe");
    let read = load(&model, &files[0]).expect("rows");
    writer.join().expect("the writer");
    assert_eq!(read.digest, load(&model, &fixture("chats.jsonl")).expect("rows").digest);
}

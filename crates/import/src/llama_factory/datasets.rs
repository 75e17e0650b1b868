//! LLaMA-Factory's data: names that `dataset_info.json` explains.

use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use crate::draft::Draft;
use crate::places::{self, Rows};
use crate::source::{Given, Source};
use crate::text::{list, quoted};
use crate::yaml::{Node, Value};

/// The longest dataset_info.json that is read, in bytes.
const LONGEST: u64 = 4 << 20;

pub(super) fn map(source: &Source<'_>, draft: &mut Draft, file: &Path) {
    let folder = folder(source, draft);
    let info = Info::find(folder, file);
    for (theirs, ours) in [("dataset", "data.train"), ("eval_dataset", "data.eval")] {
        if let Some(given) = source.get(theirs) {
            rows(draft, ours, &given, &info, folder);
        }
    }
    lengths(source, draft);
    if let Some(given) = source.get("max_samples") {
        let one = source.peek("dataset").is_some_and(|node| names(node).len() == 1);
        match given.node.integer() {
            Some(_) if !one => draft.left(&given, "of each dataset there; `data.max_rows` counts the rows of all"),
            Some(rows) => draft.other("data.max_rows", rows.to_string(), &[&given], "the first rows"),
            None => draft.left(&given, "not understood: a whole number is meant"),
        }
    }
    if let Some(given) = source.get("val_size") {
        match given.node.number() {
            Some(0.0) => draft.unset(&given),
            Some(share) if share < 1.0 => {
                draft.other(
                    "data.eval_share",
                    format!("{share:?}"),
                    &[&given],
                    "a share of the rows, by a hash of each",
                );
            }
            _ => draft.left(&given, "a number of rows there; ours is a share below 1, or a file"),
        }
    }
    if let Some(given) = source.get("template") {
        draft.left(&given, "the model's own template is used here; `chat_template` in [data] names a Jinja file");
    }
    thinking(source, draft);
    train_on(source, draft);
}

/// `enable_thinking`, which is true there if the file does not say. It is a variable of the model's template here.
fn thinking(source: &Source<'_>, draft: &mut Draft) {
    const OURS: &str = "data.chat_template_kwargs";
    if let Some(given) = source.null("enable_thinking") {
        let why = "rows without reasoning get an empty block of it in their prompt there, others none: here by \
                   `chat_template_kwargs` of each row";
        return draft.left(&given, why);
    }
    let Some(given) = source.get("enable_thinking") else { return };
    match given.node.bool() {
        Some(true) => {
            draft.other(OURS, "{ enable_thinking = true }", &[&given], "for a template that reads it");
        }
        Some(false) => {
            let why = "for a template that reads it; reasoning of rows is left out there, refused here";
            draft.other(OURS, "{ enable_thinking = false }", &[&given], why);
        }
        None => draft.left(&given, "not understood: true or false is meant"),
    }
}

/// The folder of dataset_info.json and of the files that it names.
fn folder<'a>(source: &Source<'a>, draft: &mut Draft) -> &'a str {
    let Some(given) = source.get("dataset_dir") else { return "data" };
    match given.node.text() {
        Some(folder) if !folder.starts_with("REMOTE:") && folder != "ONLINE" => {
            draft.idle(&given, "files are named whole in [data]");
            folder
        }
        _ => {
            draft.left(&given, "names of datasets are explained on the hub; `train` in [data] names files");
            "data"
        }
    }
}

/// Names of a list, or of a text with commas.
pub(super) fn names(node: &Node) -> Vec<String> {
    let texts: Vec<&str> = match &node.value {
        Value::List(items) => items.iter().filter_map(Node::text).collect(),
        _ => node.text().into_iter().flat_map(|text| text.split(',')).collect(),
    };
    texts.iter().map(|text| text.trim().to_owned()).filter(|text| !text.is_empty()).collect()
}

/// dataset_info.json.
struct Info {
    json: Json,
}

impl Info {
    /// The file in the folder of datasets, which is relative to the folder that the tool is started
    /// in: the current one, or one above the configuration.
    fn find(folder: &str, file: &Path) -> Option<Info> {
        let above = file.parent().into_iter().flat_map(Path::ancestors);
        let places = [PathBuf::new()].into_iter().chain(above.take(5).map(Path::to_path_buf));
        let candidates = places.map(|place| place.join(folder).join("dataset_info.json"));
        let beside = file.parent().map(|parent| parent.join("dataset_info.json"));
        let path = beside.into_iter().chain(candidates).find(|path| path.is_file())?;
        let length = std::fs::metadata(&path).ok()?.len();
        if length > LONGEST {
            return None;
        }
        let json = serde_json::from_str(&std::fs::read_to_string(path).ok()?).ok()?;
        Some(Info { json })
    }

    fn of(&self, name: &str) -> Option<&Json> {
        self.json.get(name).filter(|entry| entry.is_object())
    }
}

fn rows(draft: &mut Draft, key: &'static str, given: &Given<'_>, info: &Option<Info>, folder: &str) {
    let names = names(given.node);
    let entries: Option<Vec<&Json>> =
        info.as_ref().and_then(|info| names.iter().map(|name| info.of(name)).collect::<Option<Vec<&Json>>>());
    let Some(entries) = entries else {
        let why = format!(
            "files with the rows of {}, which LLaMA-Factory's {folder}/dataset_info.json explains; {}",
            names.join(", "),
            given.place()
        );
        let file = |name: &String| format!("{folder}/{name}.json");
        let files: Vec<String> = names.iter().map(file).collect();
        let value = if let [one] = files.as_slice() { quoted(one) } else { list(&files) };
        if names.is_empty() {
            return draft.left(given, "not understood: names are meant");
        }
        return draft.fill_in(key, value, &why);
    };
    let mut rows = Rows::default();
    for (name, entry) in names.iter().zip(&entries) {
        let text = |key: &str| entry.get(key).and_then(Json::as_str);
        match (text("file_name"), text("hf_hub_url")) {
            (_, Some(hub)) => rows.add(hub, text("split")),
            (Some(file), None) if file.starts_with('/') => rows.add(file, None),
            (Some(file), None) => rows.add(&format!("{}/{file}", folder.trim_end_matches('/')), None),
            (None, None) => rows.add(name, None),
        }
    }
    rows.write(draft, key, &[given]);
    if key == "data.train" {
        formats(draft, given, &names, &entries);
    }
}

/// The format and the names of columns, if all datasets agree.
fn formats(draft: &mut Draft, given: &Given<'_>, names: &[String], entries: &[&Json]) {
    for (name, entry) in names.iter().zip(entries) {
        if entry.get("ranking").and_then(Json::as_bool) == Some(true) {
            draft.left_out(&format!("{name} has pairs of a better and a worse answer, which are not trained on here"));
        }
        if let Some(count) = entry.get("num_samples") {
            draft.left_out(&format!("{name} takes {count} rows there; `data.max_rows` counts all rows"));
        }
    }
    let shape = |entry: &Json| (format_of(entry), columns_of(entry));
    let Some(first) = entries.first().map(|entry| shape(entry)) else { return };
    if entries.iter().any(|entry| shape(entry) != first) {
        return draft.left_out("the datasets have rows of several forms; `auto` tells the form, which must be one");
    }
    let (format, columns) = first;
    draft.other("data.format", quoted(format), &[given], "as dataset_info.json says");
    places::columns(draft, &columns, &[given]);
}

fn format_of(entry: &Json) -> &'static str {
    match entry.get("formatting").and_then(Json::as_str) {
        Some("sharegpt") => match tag(entry, "role_tag").as_deref() {
            Some("role") => "messages",
            _ => "sharegpt",
        },
        Some("openai") => "messages",
        _ => "alpaca",
    }
}

fn tag(entry: &Json, name: &str) -> Option<String> {
    entry.get("tags")?.get(name)?.as_str().map(str::to_owned)
}

/// (our key, their name).
fn columns_of(entry: &Json) -> Vec<(&'static str, String)> {
    let named = |name: &str| entry.get("columns").and_then(|columns| columns.get(name)).and_then(Json::as_str);
    let pairs: &[(&str, &'static str)] = match format_of(entry) {
        "alpaca" => &[
            ("prompt", "instruction"),
            ("query", "input"),
            ("response", "output"),
            ("system", "system"),
            ("history", "history"),
        ],
        "messages" => &[("messages", "messages"), ("system", "system"), ("tools", "tools")],
        _ => &[("messages", "conversations"), ("system", "system"), ("tools", "tools")],
    };
    pairs.iter().filter_map(|(theirs, ours)| Some((*ours, named(theirs)?.to_owned()))).collect()
}

fn lengths(source: &Source<'_>, draft: &mut Draft) {
    // Without it the default is 2048, as here.
    draft.integer(source, "cutoff_len", "data.max_seq_len");
    draft.theirs("data.overlong", quoted("truncate"), "longer rows are cut");
    let text = source.text("stage") == Some("pt");
    match (source.get("packing"), source.get("neat_packing")) {
        (_, Some(neat)) if neat.node.bool() == Some(true) => draft.carry("data.packing", "true", &neat),
        (packing, neat) => {
            neat.iter().for_each(|neat| draft.unset(neat));
            match packing {
                Some(given) if given.node.bool() == Some(true) => {
                    let why = "rows of a sequence see each other there, never here";
                    draft.other("data.packing", "true", &[&given], why);
                }
                Some(given) if given.node.bool() == Some(false) => draft.carry("data.packing", "false", &given),
                Some(given) => draft.left(&given, "not understood: true or false is meant"),
                None if text => draft.theirs("data.packing", "true", "rows of text are joined"),
                None => {}
            }
        }
    }
    if let Some(given) = source.get("disable_shuffling") {
        match given.node.bool() {
            Some(off) => draft.other("data.shuffle", (!off).to_string(), &[&given], "the other way round"),
            None => draft.left(&given, "not understood: true or false is meant"),
        }
    }
}

fn train_on(source: &Source<'_>, draft: &mut Draft) {
    let (prompt, history) = (source.get("train_on_prompt"), source.get("mask_history"));
    for (given, ours, why) in [(&prompt, "all", "every token"), (&history, "last", "the last answer alone")] {
        match given {
            Some(given) if given.node.bool() == Some(true) => draft.other("data.train_on", quoted(ours), &[given], why),
            Some(given) => draft.unset(given),
            None => {}
        }
    }
}

//! Which rows of the files are taken, and how often: `eval_share`, `max_rows`, `weights`.

use std::collections::BTreeSet;
use std::path::PathBuf;

use finetune_dataset::{Dataset, DatasetError, Part, Plan};
use finetune_recipe::{Data, Format};

use crate::made_up::{Model, VOCABULARY, data};

fn row(text: usize) -> String {
    format!("{{\"prompt\": \"{text}\", \"completion\": \"b\"}}\n")
}

fn part(model: &Model, files: &[PathBuf], data: &Data, part: Part) -> Result<Dataset, DatasetError> {
    Dataset::load_part(files, data, part, Some(&model.tokenizer()), VOCABULARY, usize::MAX, &|_| {})
}

fn prompts(dataset: &Dataset) -> BTreeSet<String> {
    dataset.rows.iter().map(|row| row.prompt_text.clone()).collect()
}

#[test]
fn a_share_is_held_back_and_stays_when_rows_are_added() {
    let model = Model::new(None);
    let data = Data { eval_share: Some(0.2), ..data(Format::Auto) };
    let both = |content: String| {
        let file = [model.write("rows.jsonl", content)];
        let train = part(&model, &file, &data, Part::Train).expect("rows to train on");
        let held_back = part(&model, &file, &data, Part::HeldBack).expect("rows that are held back");
        assert_eq!(train.counts.rows, train.rows.len());
        let said = format!(
            "data.eval_share = 0.2 holds back {} of {} rows",
            held_back.rows.len(),
            train.rows.len() + held_back.rows.len()
        );
        assert_eq!(train.notices, [said]);
        (prompts(&train), prompts(&held_back))
    };
    let (train, held_back) = both((0..200).map(row).collect());
    assert_eq!(train.len() + held_back.len(), 200, "no row is in both, and none is lost");
    assert!((20..60).contains(&held_back.len()), "{}", held_back.len());
    // In another order, each row twice, with more rows.
    let (more, more_held_back) = both((0..300).rev().chain(100..200).map(row).collect());
    assert!(train.is_subset(&more) && held_back.is_subset(&more_held_back));
    assert!(more.is_disjoint(&more_held_back), "equal rows stay together");
}

#[test]
fn a_share_without_rows_says_the_numbers() {
    let model = Model::new(None);
    let file = [model.write("rows.jsonl", (0..3).map(row).collect::<String>())];
    let told = |share, which| {
        let data = Data { eval_share: Some(share), ..data(Format::Auto) };
        part(&model, &file, &data, which).expect_err("no rows").to_string()
    };
    assert_eq!(told(1e-9, Part::HeldBack), "data.eval_share = 0.000000001 holds back none of 3 rows");
    assert_eq!(told(0.999_999_999, Part::Train), "data.eval_share = 0.999999999 holds back all 3 rows");
}

#[test]
fn broken_rows_are_told_once_and_by_the_rows_to_train_on() {
    let model = Model::new(None);
    let content = (0..50).map(row).collect::<String>() + "{\n";
    let file = [model.write("rows.jsonl", content)];
    let data = Data { eval_share: Some(0.3), ..data(Format::Auto) };
    assert!(matches!(part(&model, &file, &data, Part::Train), Err(DatasetError::BadRows(_))));
    part(&model, &file, &data, Part::HeldBack).expect("rows that are held back");
}

#[test]
fn no_more_rows_than_were_asked_for() {
    let model = Model::new(None);
    let files = [
        model.write("a.jsonl", (0..10).map(row).collect::<String>()),
        // What lies behind the last row is not even looked at.
        model.write("b.jsonl", (10..13).map(row).collect::<String>() + "{ no row\n"),
    ];
    let load = |rows| {
        let data = Data { max_rows: Some(rows), ..data(Format::Auto) };
        part(&model, &files, &data, Part::Train)
    };
    let dataset = load(12).expect("rows");
    assert_eq!((dataset.rows.len(), dataset.origin(11).ends_with("b.jsonl:2")), (12, true));
    assert_eq!(dataset.notices, ["data.max_rows = 12: no row behind the first 12 is read"]);
    assert!(load(100).is_err());
    let shared = Data { max_rows: Some(10), eval_share: Some(0.4), ..data(Format::Auto) };
    let count = |which| part(&model, &files, &shared, which).expect("rows").rows.len();
    assert_eq!(count(Part::Train) + count(Part::HeldBack), 10);
}

#[test]
fn weights_say_how_often_rows_come() {
    let model = Model::new(None);
    let files = vec![
        model.write("a.jsonl", (0..10).map(row).collect::<String>()),
        model.write("b.jsonl", (10..30).map(row).collect::<String>()),
    ];
    let weighted = |weights: &[f64]| {
        let data = Data { train: files.clone(), weights: weights.to_vec(), ..data(Format::Auto) };
        part(&model, &files, &data, Part::Train).expect("rows")
    };
    let plain = weighted(&[]);
    let dataset = weighted(&[2.0, 0.5]);
    assert_eq!(dataset.weights, [2.0, 0.5]);
    assert_ne!(dataset.digest, plain.digest, "a resume with other weights is another run");
    let plan = dataset.plan(7, 42, true);
    let epoch = |plan: &Plan, epoch: u64| {
        let steps = plan.steps_per_epoch();
        (epoch * steps..(epoch + 1) * steps).flat_map(|step| plan.rows(step)).collect::<Vec<_>>()
    };
    assert_eq!(plan.steps_per_epoch(), 5, "30 places by 7");
    let (first, second) = (epoch(&plan, 0), epoch(&plan, 1));
    for places in [&first, &second] {
        let count = |row: usize| places.iter().filter(|place| **place == row).count();
        assert!((0..10).all(|row| count(row) == 2), "{places:?}");
        assert!((10..30).all(|row| count(row) <= 1) && places.len() == 30, "{places:?}");
    }
    let of_second = |places: &[usize]| places.iter().copied().filter(|row| *row >= 10).collect::<BTreeSet<_>>();
    assert_ne!(of_second(&first), of_second(&second), "each epoch chooses others");
    assert_eq!(epoch(&dataset.plan(7, 42, true), 1), second, "a pure function of seed and step");
    let in_order = epoch(&dataset.plan(30, 42, false), 0);
    assert_eq!(in_order[..10], (0..10).collect::<Vec<_>>());
    assert_eq!(in_order[20..], (0..10).collect::<Vec<_>>(), "once more behind all others");
    // Weights of 1 take the steps that there are without them.
    assert_eq!(epoch(&weighted(&[1.0, 1.0]).plan(7, 42, true), 3), epoch(&plain.plan(7, 42, true), 3));
    assert_eq!(epoch(&plain.plan(7, 42, true), 3), epoch(&Plan::new(30, 7, 42, true), 3));
}

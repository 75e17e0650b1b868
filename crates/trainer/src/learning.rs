//! Whether anything will be learned: what is odd about a run's numbers, rows and steps although
//! nothing forbids it.
//!
//! `validate` and `run` give the same notices, before the first step. Nothing here stops a run.

use std::collections::HashMap;

use finetune_dataset::{Dataset, Plan, Row};
use finetune_model::{Adaptation, ModelConfig, choose, target_layers};
use finetune_recipe::{Length, Method, OptimizerName, Recipe};
use rayon::prelude::*;

use crate::numbers::{counted, rate, thousands};
use crate::schedule::Schedule;

/// Fewer steps than this hardly move anything at any rate: AdamW moves a weight by about the rate
/// per step.
const FEW_STEPS: u64 = 20;

/// The number of steps to suggest for a run with few rows.
const ENOUGH_STEPS: u64 = 40;

/// Rates above are typing errors: LoRA trains with 1e-5 to 1e-3, all weights with less.
const HIGHEST_RATE: f64 = 1e-2;

/// If the weights of an adapter can move by no more than this over the whole run, the adapter
/// hardly changes. Its second matrix begins at 0, its first with numbers of 1e-2 and more.
const LEAST_MOVEMENT: f64 = 1e-3;

/// Larger scales of an adapter come from an alpha that was meant for another formula.
const LARGEST_SCALE: f64 = 16.0;

/// Notices of how little, or how oddly, this run will learn.
pub(crate) fn learning_notices(
    recipe: &Recipe,
    train: &Dataset,
    eval: Option<&Dataset>,
    plan: &Plan,
    steps: u64,
    config: &ModelConfig,
) -> Vec<String> {
    let schedule = Schedule::new(&recipe.schedule, recipe.optimizer.learning_rate, steps);
    let mut notices = Vec::new();
    notices.extend(few_steps(recipe, train.rows.len(), steps));
    notices.extend(warm_up(&schedule, steps));
    notices.extend(rates(recipe, &schedule, steps));
    notices.extend(batch(recipe, train.rows.len()));
    notices.extend(early_stopping(recipe, eval, plan, steps));
    notices.extend(ranks_and_scales(recipe, config));
    notices.extend(repeated_rows(train, eval));
    if let Some(eval) = eval {
        notices.extend(beyond_the_context(recipe, eval, config));
    }
    notices
}

/// Too few steps.
fn few_steps(recipe: &Recipe, rows: usize, steps: u64) -> Option<String> {
    if steps >= FEW_STEPS {
        return None;
    }
    let what = if recipe.train.method == Method::Lora { "adapter" } else { "model" };
    let only = format!("only {}: the {what} will hardly change", counted(steps, "step"));
    if let Length::Steps(_) = recipe.train.length {
        return Some(format!("{only}; raise train.max_steps"));
    }
    // Small batches come first: more passes over few rows would learn them by heart.
    let mut batch = recipe.train.global_batch_size.min(rows.max(1));
    while batch > 4 && rows.div_ceil(batch) < 8 {
        batch = batch.div_ceil(2);
    }
    let epochs = ENOUGH_STEPS.div_ceil(rows.div_ceil(batch).max(1) as u64);
    let rows = counted(rows as u64, "row");
    let epochs = format!("train.epochs = {epochs}");
    Some(if batch < recipe.train.global_batch_size {
        format!("{only}; with {rows} try {epochs} and train.global_batch_size = {batch}")
    } else {
        format!("{only}; with {rows} try {epochs}")
    })
}

/// A warm-up as long as the run.
fn warm_up(schedule: &Schedule, steps: u64) -> Option<String> {
    if schedule.warmup() < steps || steps == 0 {
        return None;
    }
    let (highest, wanted) = (rate(schedule.at(steps - 1)), rate(schedule.peak()));
    Some(format!(
        "the warm-up of {} does not end within the {} of the run: the highest learning rate is {highest}, not {wanted}; \
         lower schedule.warmup_steps (warmup_ratio)",
        counted(schedule.warmup(), "step"),
        counted(steps, "step"),
    ))
}

/// A learning rate that is too high, or too low for the number of steps.
fn rates(recipe: &Recipe, schedule: &Schedule, steps: u64) -> Option<String> {
    let OptimizerName::AdamW = recipe.optimizer.name;
    let highest = recipe.optimizer.learning_rate;
    let usual = match recipe.train.method {
        Method::Lora => "LoRA usually trains with 1e-5 to 1e-3",
        Method::Full => "all weights are usually trained with 1e-6 to 1e-4",
    };
    if highest > HIGHEST_RATE {
        let text = format!("optimizer.learning_rate = {highest} is far above what AdamW trains with");
        return Some(format!("{text}: expect a loss that grows, or is no number at all; {usual}"));
    }
    // Few steps and a long warm-up have notices of their own.
    if recipe.train.method != Method::Lora || steps < FEW_STEPS || schedule.warmup() >= steps {
        return None;
    }
    // The rate is a smooth curve, so a hundred places of it are enough.
    let places = steps.min(100);
    let mean = (0..places).map(|n| schedule.at(n * steps / places)).sum::<f64>() / places as f64;
    let movement = mean * steps as f64;
    (movement < LEAST_MOVEMENT).then(|| {
        format!(
            "the learning rates of all steps add up to {}, about the most by which a weight can move: the adapter will hardly \
             change; {usual}",
            rate(movement)
        )
    })
}

/// A batch with more rows than there are.
fn batch(recipe: &Recipe, rows: usize) -> Option<String> {
    let batch = recipe.train.global_batch_size;
    (batch > rows).then(|| {
        let (batch, rows) = (thousands(batch as u64), counted(rows as u64, "row"));
        format!("train.global_batch_size = {batch} is more than there is: each step takes all {rows}")
    })
}

/// Early stopping that cannot act.
fn early_stopping(recipe: &Recipe, eval: Option<&Dataset>, plan: &Plan, steps: u64) -> Option<String> {
    let (patience, _) = recipe.eval.early_stopping_patience.zip(eval)?;
    // The last evaluation ends the run anyway, and the first is always the best so far.
    let every = recipe.eval.every;
    let before_the_last = steps.saturating_sub(1).checked_div(every).unwrap_or(0);
    (before_the_last <= patience).then(|| {
        format!(
            "early stopping cannot act: there are {} of held-back rows before the last step, and eval.early_stopping_patience = \
             {patience} needs more; lower eval.every (an epoch has {})",
            counted(before_the_last, "evaluation"),
            counted(plan.steps_per_epoch(), "step"),
        )
    })
}

/// Ranks beyond the size of a layer, and scales beyond the usual.
fn ranks_and_scales(recipe: &Recipe, config: &ModelConfig) -> Vec<String> {
    if recipe.train.method != Method::Lora {
        return Vec::new();
    }
    // Targets that match nothing are refused elsewhere.
    let layers = target_layers(config);
    let Ok(Adaptation { targets, .. }) = choose(&recipe.lora, config) else { return Vec::new() };
    let sizes: HashMap<&str, usize> =
        layers.iter().map(|layer| (layer.module.as_str(), layer.outputs.min(layer.inputs))).collect();
    let size = |module: &str| sizes.get(module).copied();
    let mut notices = Vec::new();
    let beyond: Vec<_> = targets.iter().filter_map(|target| Some((target, size(&target.module)?))).collect();
    let beyond: Vec<_> = beyond.into_iter().filter(|(target, size)| target.rank > *size).collect();
    if let Some((target, size)) = beyond.iter().min_by_key(|(_, size)| *size) {
        notices.push(format!(
            "rank {} is above the size of {} (the smallest is {}, {size}): no rank above a layer's size adds anything but memory; \
             lower lora.rank",
            thousands(target.rank as u64),
            counted(beyond.len() as u64, "layer"),
            target.module,
        ));
    }
    let scale = |target: &&finetune_model::LoraTarget| f64::from(target.scale());
    let largest = targets.iter().max_by(|one, other| scale(one).total_cmp(&scale(other)));
    if let Some(target) = largest.filter(|target| scale(target) > LARGEST_SCALE) {
        let (alpha, rank, scale) = (target.alpha, target.rank, scale(&target));
        notices.push(match target.use_rslora {
            true => format!(
                "with rsLoRA the adapter is scaled by alpha / sqrt(rank) = {alpha} / sqrt({rank}) = {scale:.1}; without, it would be \
                 {:.1}: an alpha that was chosen for plain LoRA is too large here",
                alpha / rank as f64
            ),
            false => format!(
                "the adapter is scaled by alpha / rank = {alpha} / {rank} = {scale:.1}; usual are 1 and 2: lower lora.alpha"
            ),
        });
    }
    notices
}

/// Training rows that repeat others, and held-back rows that are training rows too.
fn repeated_rows(train: &Dataset, eval: Option<&Dataset>) -> Vec<String> {
    let mut first: HashMap<u64, usize> = HashMap::with_capacity(train.rows.len());
    let mut repeated = Repeated::default();
    for (row, hash) in hashes(&train.rows).into_iter().enumerate() {
        match first.get(&hash) {
            Some(&same) => repeated.add(row, same),
            None => {
                first.insert(hash, row);
            }
        }
    }
    let mut notices = Vec::new();
    if let Some((row, same)) = repeated.first {
        notices.push(format!(
            "{} of {} are repeated ({} is {})",
            thousands(repeated.count),
            counted(train.rows.len() as u64, "training row"),
            train.origin(row),
            train.origin(same)
        ));
    }
    let Some(eval) = eval else { return notices };
    let mut known = Repeated::default();
    for (row, hash) in hashes(&eval.rows).into_iter().enumerate() {
        if let Some(&same) = first.get(&hash) {
            known.add(row, same);
        }
    }
    if let Some((row, same)) = known.first {
        notices.push(format!(
            "{} of {} are training rows too ({} is {}): their loss says nothing about rows that the model has not seen",
            thousands(known.count),
            counted(eval.rows.len() as u64, "held-back row"),
            eval.origin(row),
            train.origin(same)
        ));
    }
    notices
}

/// How many rows repeat another, and the first with the row that it repeats.
#[derive(Default)]
struct Repeated {
    count: u64,
    first: Option<(usize, usize)>,
}

impl Repeated {
    fn add(&mut self, row: usize, same: usize) {
        self.count += 1;
        self.first.get_or_insert((row, same));
    }
}

/// A hash of each row's tokens. With 64 bits, equal hashes of different rows are unlikely even
/// among a billion rows.
fn hashes(rows: &[Row]) -> Vec<u64> {
    let hash = |row: &Row| {
        let hash = blake3::hash(bytemuck::cast_slice(&row.tokens));
        let (first, _) = hash.as_bytes().split_at(8);
        u64::from_le_bytes(first.try_into().expect("eight bytes"))
    };
    rows.par_iter().map(hash).collect()
}

/// Held-back rows, and answers to them, that are longer than the model was made for.
fn beyond_the_context(recipe: &Recipe, eval: &Dataset, config: &ModelConfig) -> Vec<String> {
    let limit = config.max_position_embeddings;
    let mut notices = Vec::new();
    if eval.counts.longest > limit {
        let longest = thousands(eval.counts.longest as u64);
        notices.push(format!(
            "the longest held-back row has {longest} tokens; the model was made for {} positions",
            thousands(limit as u64)
        ));
    }
    let answered = recipe.eval.samples.max(recipe.eval.exact_match);
    let longest = eval.rows.iter().take(answered).map(|row| row.prompt_tokens).max().unwrap_or(0);
    if longest + recipe.eval.max_new_tokens > limit && answered > 0 {
        notices.push(format!(
            "answers of eval.max_new_tokens = {} to a prompt of {} go beyond the {} positions that the model was made for",
            thousands(recipe.eval.max_new_tokens as u64),
            counted(longest as u64, "token"),
            thousands(limit as u64)
        ));
    }
    notices
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use finetune_dataset::ChatTokenizer;

    use super::*;

    const CONFIG: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "hidden_size": 16,
        "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "hidden_act": "silu", "max_position_embeddings": 48, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": true}"#;

    /// Rows of tokens, read from a file as a run reads them.
    fn rows(folder: &Path, name: &str, rows: &[Vec<u32>]) -> Dataset {
        let line = |tokens: &Vec<u32>| format!("{{\"input_ids\": {tokens:?}, \"labels\": {tokens:?}}}\n");
        let path = folder.join(name);
        let text: String = rows.iter().map(line).collect();
        finetune_store::replace_file(&finetune_store::RealDisk, &path, text.as_bytes()).expect("a file");
        let data = recipe(&[]).data;
        Dataset::load(&[path], &data, None::<&ChatTokenizer>, 64, 0, &|_| {}).unwrap_or_else(|error| panic!("{error}"))
    }

    fn recipe(sets: &[&str]) -> Recipe {
        let text = "[model]\npath = \"m\"\n[data]\ntrain = \"t.jsonl\"\neval = \"e.jsonl\"\nformat = \"tokens\"\n";
        let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
        Recipe::parse(text, Path::new("r.toml"), &sets, Some(Path::new("run")))
            .unwrap_or_else(|error| panic!("{error}"))
    }

    fn config() -> ModelConfig {
        ModelConfig::parse(CONFIG, Path::new("config.json")).unwrap_or_else(|error| panic!("{error}"))
    }

    /// `count` different rows, made from the numbers `from` on.
    fn different(count: u32, from: u32) -> Vec<Vec<u32>> {
        (0..count).map(|n| vec![1 + (from + n) % 60, 2 + (from + n) / 60, 3, 4]).collect()
    }

    fn said(sets: &[&str], train: &Dataset, eval: Option<&Dataset>) -> Vec<String> {
        let recipe = recipe(sets);
        let plan = Plan::new(train.rows.len(), recipe.train.global_batch_size, 1, true);
        let steps = crate::examine::total_steps(&recipe, &plan);
        learning_notices(&recipe, train, eval, &plan, steps, &config())
    }

    #[test]
    fn a_sound_run_is_told_nothing() {
        let folder = tempfile::tempdir().expect("a directory");
        let train = rows(folder.path(), "t.jsonl", &different(100, 0));
        let eval = rows(folder.path(), "e.jsonl", &different(10, 200));
        for sets in [
            ["train.max_steps=200", "schedule.warmup_ratio=0.1"],
            ["train.max_steps=20", "optimizer.learning_rate=1e-3"],
            ["train.max_steps=100", "lora.use_rslora=true"],
            ["train.epochs=10", "data.shuffle=false"],
        ] {
            let sets = [&sets[..], &["lora.rank=4", "lora.alpha=8", "eval.every=10"]].concat();
            assert_eq!(said(&sets, &train, Some(&eval)), [""; 0], "{sets:?}");
        }
    }

    #[test]
    fn each_oddity_is_told_by_name() {
        let folder = tempfile::tempdir().expect("a directory");
        let train = rows(folder.path(), "t.jsonl", &different(32, 0));
        let eval = rows(folder.path(), "e.jsonl", &different(8, 100));
        let cases: [(&[&str], &str); 16] = [
            (
                &[],
                "only 2 steps: the adapter will hardly change; with 32 rows try train.epochs = 5 and train.global_batch_size = 4",
            ),
            (&["train.epochs=2", "train.global_batch_size=4"], "with 32 rows try train.epochs = 5"),
            (&["train.max_steps=1"], "only 1 step: the adapter will hardly change; raise train.max_steps"),
            (&["train.max_steps=5", "train.method=full"], "only 5 steps: the model will hardly change"),
            (
                &["train.max_steps=30", "schedule.warmup_steps=500", "optimizer.learning_rate=1e-2"],
                "the warm-up of 500 steps does not end within the 30 steps of the run: the highest learning rate is 5.8e-4, not 1.0e-2",
            ),
            // The only step of a run is the first of its warm-up, at rate 0.
            (&["train.max_steps=1", "schedule.warmup_ratio=0.1"], "the highest learning rate is 0, not 2.0e-4"),
            (&["optimizer.learning_rate=5"], "optimizer.learning_rate = 5 is far above"),
            (&["optimizer.learning_rate=0.2", "train.method=full"], "all weights are usually trained with"),
            (&["optimizer.learning_rate=1e-7", "train.max_steps=100"], "the learning rates of all steps add up to"),
            (
                &["train.global_batch_size=1000000"],
                "train.global_batch_size = 1,000,000 is more than there is: each step takes all 32 rows",
            ),
            (
                &["lora.rank=4096"],
                "rank 4,096 is above the size of 14 layers (the smallest is model.layers.0.self_attn.k_proj, 8)",
            ),
            (
                &["lora.rank=4", "lora.rank_pattern={ \"1.mlp.down_proj\" = 17 }"],
                "rank 17 is above the size of 1 layer",
            ),
            (&["lora.alpha=512", "lora.rank=8"], "alpha / rank = 512 / 8 = 64.0; usual are 1 and 2"),
            (&["lora.alpha=128", "lora.rank=16", "lora.use_rslora=true"], "alpha / sqrt(rank) = 128 / sqrt(16) = 32.0"),
            (
                &["eval.early_stopping_patience=3", "train.max_steps=40"],
                "early stopping cannot act: there are 0 evaluations of held-back rows before the last step",
            ),
            (&["eval.samples=1", "eval.max_new_tokens=64"], "answers of eval.max_new_tokens = 64 to a prompt of "),
        ];
        for (sets, want) in cases {
            let said = said(sets, &train, Some(&eval));
            assert!(said.iter().any(|line| line.contains(want)), "{sets:?} lacks {want:?}: {said:#?}");
        }
    }

    #[test]
    fn repeated_and_known_rows_are_counted() {
        let folder = tempfile::tempdir().expect("a directory");
        let sets = ["train.max_steps=100", "lora.rank=4", "lora.alpha=8"];
        let train = rows(folder.path(), "t.jsonl", &[different(5, 0), different(2, 1), different(1, 1)].concat());
        let eval = rows(folder.path(), "e.jsonl", &[different(3, 50), different(2, 3)].concat());
        let said = said(&sets, &train, Some(&eval));
        let place = |name: &str, line: usize| format!("{}:{line}", folder.path().join(name).display());
        let want = [
            "train.global_batch_size = 16 is more than there is: each step takes all 8 rows".to_owned(),
            format!("3 of 8 training rows are repeated ({} is {})", place("t.jsonl", 6), place("t.jsonl", 2)),
            format!(
                "2 of 5 held-back rows are training rows too ({} is {}): their loss says nothing about rows that the model has \
                 not seen",
                place("e.jsonl", 4),
                place("t.jsonl", 4)
            ),
        ];
        assert_eq!(said, want);
    }

    #[test]
    fn held_back_rows_beyond_the_context() {
        let folder = tempfile::tempdir().expect("a directory");
        let train = rows(folder.path(), "t.jsonl", &different(32, 0));
        let eval = rows(folder.path(), "e.jsonl", &[(1..60).collect()]);
        let said = said(&[], &train, Some(&eval));
        let want = "the longest held-back row has 59 tokens; the model was made for 48 positions";
        assert!(said.iter().any(|line| line == want), "{said:#?}");
    }
}

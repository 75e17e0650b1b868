//! What a run says before its first step and after its last: what is trained, what came of it, and
//! what to type next.

use std::path::{Path, PathBuf};

use finetune_recipe::{Method, Recipe, SharesChoice, TargetModules};
use finetune_trainer::numbers::{counted, rate, thousands};
use finetune_trainer::{Best, Run, Summary};

/// The most names that are listed. Others are counted.
const SHOWN_NAMES: usize = 8;

/// The longest prompt, in characters, that is shown in a command to paste.
const LONGEST_PROMPT: usize = 80;

/// What is trained and how, in two lines.
pub(crate) fn panel(run: &Run) -> [String; 2] {
    let recipe = &run.recipe;
    let model = model_name(recipe);
    let what = match (recipe.train.method, run.model.lora_targets()) {
        (Method::Lora, Some(targets)) => {
            let ranks: Vec<usize> = targets.iter().map(|target| target.rank).collect();
            let (low, high) = (ranks.iter().min().unwrap_or(&0), ranks.iter().max().unwrap_or(&0));
            let rank = if low == high { low.to_string() } else { format!("{low} to {high}") };
            let layers = counted(targets.len() as u64, "layer");
            format!("LoRA of rank {rank}, alpha {} on {} ({layers})", recipe.lora.alpha, modules(recipe))
        }
        _ => "all weights are trained".to_owned(),
    };
    let batch = recipe.train.global_batch_size.min(run.train.rows.len());
    let at_once = recipe.train.micro_batch_size;
    let parts = if at_once < batch { format!(" ({at_once} at a time)") } else { String::new() };
    let epochs = run.steps as f64 / run.plan.steps_per_epoch().max(1) as f64;
    let passes = match epochs {
        1.0 => "1 pass".to_owned(),
        whole if whole.fract() == 0.0 => format!("{} passes", thousands(whole as u64)),
        part => format!("{part:.1} passes"),
    };
    let how = format!(
        "{} of {}{parts}, {passes} over {}; learning rate {}, {}",
        counted(run.steps, "step"),
        counted(batch as u64, "row"),
        counted(run.train.rows.len() as u64, "row"),
        rate(recipe.optimizer.learning_rate),
        recipe.schedule.name.as_str(),
    );
    [format!("{model}: {what}"), how]
}

fn modules(recipe: &Recipe) -> String {
    let and_experts = if recipe.lora.experts { " and experts" } else { "" };
    let chosen = match &recipe.lora.target_modules {
        TargetModules::AllLinear => "all linear layers".to_owned(),
        TargetModules::Regex(regex) => format!("what {regex:?} matches"),
        TargetModules::Names(names) => {
            let more = names.len().saturating_sub(SHOWN_NAMES);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            format!("{}{more}", names.iter().take(SHOWN_NAMES).cloned().collect::<Vec<_>>().join(", "))
        }
    };
    chosen + and_experts
}

/// The hub's name of the base model, else that of its directory.
fn model_name(recipe: &Recipe) -> String {
    let named = Path::new(&recipe.model.path).file_name().map(|name| name.to_string_lossy().into_owned());
    let of_hub = recipe.model.hub_id().map(|id| id.split('@').next().unwrap_or(id).to_owned());
    of_hub.or(named).unwrap_or_else(|| recipe.model.path.clone())
}

/// The result of a run: what others load.
pub(crate) fn result(recipe: &Recipe) -> PathBuf {
    recipe.output_dir.join(match recipe.train.method {
        Method::Lora => "adapter",
        Method::Full => "model",
    })
}

/// What came of it: losses before and after, and which step the result is.
pub(crate) fn outcome(recipe: &Recipe, step: u64, summary: &Summary) -> Vec<String> {
    let Summary { loss, eval, best, result_step } = summary;
    let pairs = [("loss", loss), ("held-back rows", eval)];
    let pairs: Vec<String> = pairs
        .iter()
        .filter_map(|(name, pair)| pair.map(|(before, after)| format!("{name} {before:.4} → {after:.4}")))
        .collect();
    let mut lines: Vec<String> = if pairs.is_empty() { Vec::new() } else { vec![pairs.join(", ")] };
    if let Some((before, after)) = eval
        && after > before
    {
        lines.push("on held-back rows the result is worse than the model was before: try fewer steps, or a lower learning rate".to_owned());
    }
    let name = result(recipe).file_name().unwrap_or_default().to_string_lossy().into_owned();
    match best {
        Some(Best { step: best, eval_loss }) if result_step == best => {
            let last = if *best == step { ", which is the last" } else { "" };
            lines.push(format!("{name}/ is step {best}{last}, the best on held-back rows ({eval_loss:.4})"));
        }
        Some(Best { step: best, eval_loss }) => {
            let text = format!("{name}/ is step {result_step}, the last; the best on held-back rows was step {best}");
            lines.push(format!("{text} ({eval_loss:.4}): checkpoint.result = \"best\" makes that the result"));
        }
        None => {}
    }
    lines
}

/// Commands to go on with, ready to paste into the same terminal.
pub(crate) fn next_commands(run: &Run, program: &str) -> Vec<String> {
    let recipe = &run.recipe;
    let (program, result) = (quoted(program), path(&result(recipe)));
    let model = match recipe.train.method {
        Method::Lora => format!("{} --adapter {result}", path(Path::new(&recipe.model.path))),
        Method::Full => result,
    };
    let mut commands = Vec::new();
    if let Some(tokenizer) = &run.tokenizer {
        let rows = run.eval.iter().flat_map(|eval| &eval.rows).take(100);
        let prompt = rows.map(|row| row.prompt_text.trim()).find(|prompt| is_one_line(prompt)).unwrap_or("Hello");
        let raw = if tokenizer.has_template() { "" } else { " --raw" };
        commands.push(format!("try it     {program} generate {model} --prompt {}{raw}", quoted(prompt)));
        if tokenizer.has_template() {
            commands.push(format!("talk       {program} chat {}", path(&recipe.output_dir)));
        }
    }
    // A share that is held back lies in the files that are trained on.
    let measured = run.eval.as_ref().filter(|_| recipe.data.eval_share.is_none());
    if let Some(file) = measured.and_then(|eval| eval.files.first()) {
        commands.push(format!("measure    {program} eval {model} --data {}", path(file)));
    }
    if recipe.train.method == Method::Lora {
        let directory = &recipe.output_dir;
        let mut output = directory.clone().into_os_string();
        output.push("-merged");
        let (directory, output) = (path(directory), path(Path::new(&output)));
        commands.push(format!("export     {program} export {directory} --format merged --output {output}"));
    }
    commands
}

fn is_one_line(prompt: &str) -> bool {
    let letters = prompt.chars().count();
    (1..=LONGEST_PROMPT).contains(&letters) && !prompt.starts_with('-') && !prompt.chars().any(char::is_control)
}

/// A path as a word of a command line.
pub(crate) fn path(path: &Path) -> String {
    let text = path.to_string_lossy();
    if text.starts_with('-') { quoted(&format!("./{text}")) } else { quoted(&text) }
}

/// A word as POSIX shells, fish and zsh read it back.
fn quoted(word: &str) -> String {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "_./:@%+,-".contains(letter);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    // Within single quotes, fish takes a backslash before another one or a quote as an escape.
    // Outside of quotes all shells agree.
    let mut text = String::from("'");
    for letter in word.chars() {
        match letter {
            '\'' => text.push_str("'\\''"),
            '\\' => text.push_str("'\\\\'"),
            letter => text.push(letter),
        }
    }
    text + "'"
}

/// A hint against waiting for a slow rank. `None` if the recipe does it already.
pub(crate) fn advice_on_shares(recipe: &Recipe, world: usize) -> Option<String> {
    match (recipe.distributed.shares, recipe.distributed.virtual_ranks) {
        (SharesChoice::Measured, _) => None,
        (SharesChoice::Even, Some(shares)) if shares > world => Some(format!(
            "distributed.shares = \"measured\" gives each rank as many of the {shares} shares of a step as it is fast, without changing \
             a bit: stop, set it and go on with --resume"
        )),
        (SharesChoice::Even, _) => Some(format!(
            "a new run with distributed.virtual_ranks = {} and distributed.shares = \"measured\" shares rows out by speed",
            8 * world
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_a_shell() {
        let cases = [
            ("runs/a-1.2", "runs/a-1.2"),
            ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
            ("", "''"),
            ("my runs/a", "'my runs/a'"),
            ("it's", "'it'\\''s'"),
            ("~/runs", "'~/runs'"),
            ("$HOME `x` \"y\"", "'$HOME `x` \"y\"'"),
            ("a\\b", "'a'\\\\'b'"),
            ("é", "'é'"),
        ];
        for (word, want) in cases {
            assert_eq!(quoted(word), want, "{word}");
        }
        assert_eq!(path(Path::new("-x/y")), "./-x/y");
    }

    /// A shell reads the quoted words back as they were.
    #[test]
    fn a_shell_reads_them_back() {
        for word in ["", "a b", "it's", "\\", "'\\'", "$x \"y\" `z` * ~ #", "a\tb", "ü"] {
            let output = std::process::Command::new("sh").args(["-c", &format!("printf %s {}", quoted(word))]).output();
            let output = output.expect("a shell");
            assert_eq!(String::from_utf8_lossy(&output.stdout), word);
        }
    }

    fn recipe(more: &str) -> Recipe {
        let text = format!("[model]\npath = \"acme/tiny\"\n[data]\ntrain = \"t.jsonl\"\n{more}");
        Recipe::parse(&text, Path::new("r.toml"), &[], Some(Path::new("runs/x")))
            .unwrap_or_else(|error| panic!("{error}"))
    }

    #[test]
    fn the_end_says_what_the_result_is() {
        let best = Some(Best { step: 30, eval_loss: 1.48 });
        let both = Summary { loss: Some((2.94, 1.16)), eval: Some((3.147, 1.498)), best, result_step: 40 };
        let cases = [
            (
                both.clone(),
                vec![
                    "loss 2.9400 → 1.1600, held-back rows 3.1470 → 1.4980",
                    "adapter/ is step 40, the last; the best on held-back rows was step 30 (1.4800): checkpoint.result = \"best\" makes that the result",
                ],
            ),
            (
                Summary { eval: Some((3.0, 1.48)), result_step: 30, ..both.clone() },
                vec![
                    "loss 2.9400 → 1.1600, held-back rows 3.0000 → 1.4800",
                    "adapter/ is step 30, the best on held-back rows (1.4800)",
                ],
            ),
            (
                Summary { best: Some(Best { step: 40, eval_loss: 1.498 }), ..both.clone() },
                vec![
                    "loss 2.9400 → 1.1600, held-back rows 3.1470 → 1.4980",
                    "adapter/ is step 40, which is the last, the best on held-back rows (1.4980)",
                ],
            ),
            (
                Summary { eval: Some((1.0, 1.5)), best: None, ..both },
                vec![
                    "loss 2.9400 → 1.1600, held-back rows 1.0000 → 1.5000",
                    "on held-back rows the result is worse than the model was before: try fewer steps, or a lower learning rate",
                ],
            ),
            (Summary::default(), vec![]),
        ];
        for (summary, want) in cases {
            assert_eq!(outcome(&recipe(""), 40, &summary), want);
        }
    }

    #[test]
    fn slow_ranks_have_a_way_out() {
        let with = "[distributed]\nvirtual_ranks = 16\n";
        assert!(
            advice_on_shares(&recipe(with), 2)
                .is_some_and(|text| text.contains("16 shares") && text.contains("--resume"))
        );
        assert!(advice_on_shares(&recipe(""), 2).is_some_and(|text| text.contains("virtual_ranks = 16")));
        let measured = format!("{with}shares = \"measured\"\n");
        assert_eq!(advice_on_shares(&recipe(&measured), 2), None);
    }
}

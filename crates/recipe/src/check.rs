//! Rules between keys. What concerns one value alone is in its declaration and in `kind`.

use crate::keys::KEYS;
use crate::path::is_hub_rows;
use crate::problem::Problem;
use crate::read::Reader;
use crate::{Distributed, DtypeChoice, Method, Recipe, ResidencyChoice, SharesChoice, StagesChoice, WireChoice};

/// Notes every rule between keys that the recipe breaks.
pub(crate) fn rules(recipe: &Recipe, reader: &mut Reader<'_>) {
    for key in KEYS {
        let Some(one) = key.replaces() else { continue };
        let other = key.path;
        if reader.has(one) && reader.has(other) {
            let message = format!("`{one}` and `{other}` say the same thing twice");
            reader.problems.push(Problem::new(reader.location(other), message).hint("keep one of them"));
        }
    }
    if recipe.train.method == Method::Full {
        full_method(recipe, reader);
    }
    let Distributed { shares, virtual_ranks, .. } = &recipe.distributed;
    if *shares == SharesChoice::Measured && virtual_ranks.is_none() {
        let message = "`distributed.shares = \"measured\"` needs `virtual_ranks`: without, another share of the rows is another sum";
        let problem = Problem::new(reader.location("distributed.shares"), message);
        let hint = "add virtual_ranks to [distributed], several times the number of machines: the more, the more finely shares follow speed";
        reader.problems.push(problem.hint(hint));
    }
    if *shares == SharesChoice::Measured && matches!(recipe.parallel.stages, StagesChoice::Count(2..)) {
        let message = "`distributed.shares = \"measured\"` shares rows out among ranks, and with `parallel.stages` ranks share layers";
        reader
            .problems
            .push(Problem::new(reader.location("distributed.shares"), message).hint("leave one of them out"));
    }
    slow_networks(recipe, reader);
    layers_of_ranks(recipe, reader);
    weights(recipe, reader);
    // A directory in `train` may hold a valid.jsonl, and so may a data set of the hub. Whether it does
    // is checked by the dataset.
    let has_eval = reader.has("data.eval")
        || reader.has("data.eval_share")
        || recipe.data.train.iter().any(|path| path.is_dir() || is_hub_rows(path));
    if !has_eval {
        let needs_rows = [
            ("eval.early_stopping_patience", recipe.eval.early_stopping_patience.is_some()),
            ("eval.samples", recipe.eval.samples > 0),
            ("eval.exact_match", recipe.eval.exact_match > 0),
        ];
        for (path, wanted) in needs_rows {
            if wanted && reader.has(path) {
                let message = format!("`{path}` needs evaluation rows, and `data.eval` is not given");
                let problem = Problem::new(reader.location(path), message);
                reader.problems.push(problem.hint(
                    "name a file of held-back rows: `eval` in [data]; or hold a part of the rows back: `eval_share`",
                ));
            }
        }
    }
}

/// What goes with steps that ranks make alone, and with rounded gradients.
fn slow_networks(recipe: &Recipe, reader: &mut Reader<'_>) {
    let Distributed { shares, virtual_ranks, sync_every, wire, .. } = &recipe.distributed;
    let is_alone = sync_every.is_some_and(|steps| steps > 1);
    let is_staged = matches!(recipe.parallel.stages, StagesChoice::Count(2..) | StagesChoice::Auto);
    let mut refuse = |key: &str, message: &str, hint: &str| {
        let problem = Problem::new(reader.location(key), message);
        reader.problems.push(problem.hint(hint));
    };
    if is_alone && is_staged {
        let message =
            "`distributed.sync_every` lets ranks train alone, and with `parallel.stages` none has the whole model";
        refuse("distributed.sync_every", message, "leave one of them out");
    }
    if is_alone && *shares == SharesChoice::Measured {
        let message =
            "`distributed.shares = \"measured\"` moves rows between ranks, and with `sync_every` each trains alone";
        refuse("distributed.shares", message, "leave one of them out");
    }
    if is_alone && recipe.model.dtype == DtypeChoice::F16 {
        let message = "`distributed.sync_every` keeps no loss scale for each rank, which `model.dtype = \"f16\"` needs";
        refuse("distributed.sync_every", message, "use dtype = \"bf16\"");
    }
    for (key, is_given) in [
        ("distributed.outer_learning_rate", recipe.distributed.outer_learning_rate.is_some()),
        ("distributed.outer_momentum", recipe.distributed.outer_momentum.is_some()),
    ] {
        if is_given && !is_alone {
            refuse(
                key,
                &format!("`{key}` has no effect without `sync_every`"),
                "add sync_every, such as 20, or leave it out",
            );
        }
    }
    if *wire == Some(WireChoice::Bf16) && virtual_ranks.is_some() {
        let message = "`distributed.wire = \"bf16\"` rounds the gradients of each process, and with `virtual_ranks` their number \
                       must not show";
        refuse("distributed.wire", message, "leave one of them out");
    }
}

/// Each rank of a model has a number of layers.
fn layers_of_ranks(recipe: &Recipe, reader: &mut Reader<'_>) {
    let given = recipe.parallel.layers.len();
    if given == 0 || recipe.parallel.stages == StagesChoice::Count(given) {
        return;
    }
    let ranks = match given {
        1 => "one rank".to_owned(),
        given => format!("{given} ranks"),
    };
    let message = format!("`parallel.layers` has the layers of {ranks}, and `parallel.stages` is not {given}");
    let problem = Problem::new(reader.location("parallel.layers"), message);
    reader.problems.push(problem.hint(format!("write stages = {given}, or one number for each of the stages")));
}

/// Each entry of `data.train` has one weight.
fn weights(recipe: &Recipe, reader: &mut Reader<'_>) {
    /// More copies of a row are a mistake.
    const LARGEST: f64 = 100.0;
    let (files, weights) = (recipe.data.train.len(), &recipe.data.weights);
    if weights.is_empty() || !reader.has("data.train") {
        return;
    }
    let location = reader.location("data.weights");
    if weights.len() != files {
        let message = format!("`data.weights` has {}, and `data.train` names {files}", weights.len());
        reader.problems.push(Problem::new(location, message).hint("one weight for each entry of `train`, in order"));
    } else if let Some(large) = weights.iter().find(|weight| **weight > LARGEST) {
        let message = format!("`data.weights` has {large}, and a row is taken at most {LARGEST} times an epoch");
        reader.problems.push(Problem::new(location, message).hint("weights count: 2.0 takes each row twice an epoch"));
    }
}

/// Full fine-tuning has no adapter and no frozen base. Keys about them would have no effect, so
/// they are refused.
fn full_method(recipe: &Recipe, reader: &mut Reader<'_>) {
    for key in KEYS.iter().filter(|key| key.table() == "lora" && reader.has(key.path)).collect::<Vec<_>>() {
        let message = format!("`{}` has no effect with `train.method = \"full\"`", key.path);
        let problem = Problem::new(reader.location(key.path), message);
        reader.problems.push(problem.hint("remove the [lora] table, or use method = \"lora\""));
    }
    if reader.has("model.quantization") {
        let message = "`model.quantization` quantizes a frozen base, and `train.method = \"full\"` has none";
        let problem = Problem::new(reader.location("model.quantization"), message);
        reader.problems.push(problem.hint("remove it, or use method = \"lora\""));
    }
    if recipe.model.residency == ResidencyChoice::Disk {
        let message =
            "`model.residency = \"disk\"` leaves frozen layers on the disk, and `train.method = \"full\"` has none";
        let problem = Problem::new(reader.location("model.residency"), message);
        reader.problems.push(problem.hint("remove it, or use method = \"lora\""));
    }
    if matches!(recipe.parallel.stages, StagesChoice::Count(2..)) {
        let message = "`parallel.stages` spreads frozen layers over ranks, and `train.method = \"full\"` has none";
        let problem = Problem::new(reader.location("parallel.stages"), message);
        reader.problems.push(problem.hint("remove it, or use method = \"lora\""));
    }
}

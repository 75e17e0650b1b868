//! What an adapter trains: LoRA branches, and modules in full beside them. The rules are those of
//! PEFT 0.21.

use std::collections::{HashMap, HashSet};

use finetune_recipe::{Lora, TargetModules};

use crate::branch::{EMBEDDING, OUTPUT, Place};
use crate::config::ModelConfig;
use crate::error::{ModelError, list};
use crate::files::wrapper::{module_in_text, name_inside};
use crate::lora::{EXPERTS, LoraTarget, LoraTargets, choose_targets};
use crate::tree::Decoder;

/// What an adapter trains.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Adaptation {
    /// The branches, in model order: the embedding's first, the output layer's last.
    pub targets: LoraTargets,
    /// Modules that are trained in full, in model order: norms, linear layers, the embedding
    /// (`model.embed_tokens`), the output layer (`lm_head`).
    pub saved: Vec<String>,
    /// The probability that an element of a branch's input is dropped in training. The branch of
    /// the embedding has no dropout.
    pub dropout: f64,
}

/// A layer that may have a branch: the embedding, a linear layer, or the output layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetLayer {
    /// Such as `model.layers.0.self_attn.q_proj`.
    pub module: String,
    /// Rows of B: the outputs of the layer; of the embedding, the hidden size.
    pub outputs: usize,
    /// Columns of A: the inputs of the layer; of the embedding, the tokens of the vocabulary.
    pub inputs: usize,
}

impl Adaptation {
    /// Whether a tensor of the model, such as `model.norm.weight`, is trained in full.
    pub fn saves(&self, tensor: &str) -> bool {
        let module = module_of(tensor);
        self.saved.iter().any(|saved| saved == module)
    }

    /// Whether embedding or output layer are trained. Then they differ, even if they were one matrix.
    pub fn trains_vocabulary(&self) -> bool {
        let saved = self.saved.iter().map(String::as_str);
        saved.chain(self.targets.iter().map(|target| target.module.as_str())).any(is_of_vocabulary)
    }

    /// Whether the embedding's own values stay as they are. A branch beside it leaves them so.
    pub fn keeps_embedding(&self) -> bool {
        !self.saved.iter().any(|saved| saved == EMBEDDING)
    }

    /// The number of trained elements of the branches, and of the modules that are trained in full.
    pub fn elements(&self, config: &ModelConfig) -> (u64, u64) {
        let layers = target_layers(config);
        let layers: HashMap<&str, &TargetLayer> = layers.iter().map(|layer| (layer.module.as_str(), layer)).collect();
        let of_branch = |module: &str, rank: usize, use_dora: bool| {
            layers.get(module).map_or(0, |layer| {
                (rank * (layer.outputs + layer.inputs) + usize::from(use_dora) * layer.outputs) as u64
            })
        };
        let branches = self.targets.iter().map(|target| of_branch(&target.module, target.rank, target.use_dora)).sum();
        (branches, saved_tensors(config, self).iter().map(|(_, shape)| shape.iter().product::<usize>() as u64).sum())
    }

    /// Bytes in f32 of the embedding and an output layer of its own, as far as they are not trained
    /// in full: what an adapter's file holds besides what is trained if rows were added.
    pub fn frozen_vocabulary_bytes(&self, config: &ModelConfig) -> u64 {
        let is_saved = |module: &str| self.saved.iter().any(|saved| saved == module);
        let has_output = !config.tied_embeddings || is_saved(EMBEDDING) || is_saved(OUTPUT);
        let frozen = [(EMBEDDING, true), (OUTPUT, has_output)];
        let matrices = frozen.iter().filter(|(module, is_there)| *is_there && !is_saved(module)).count();
        4 * (matrices * config.vocabulary * config.hidden_size) as u64
    }

    /// What a user should know about experts, embedding and output layer of a model of this config.
    pub fn notices(&self, config: &ModelConfig) -> Vec<String> {
        let mut notices = Vec::new();
        if let Some(experts) = &config.experts {
            let count = experts.count;
            if !self.targets.iter().any(|target| is_of_experts(&target.module)) {
                notices.push(format!(
                    "the {count} experts of each layer and their routers stay as they are; lora.experts = true trains the experts too"
                ));
            } else if !config.family.peft_reads_experts() && !config.family.has_expert_parameters() {
                notices.push(format!(
                    "PEFT 0.21 leaves branches of single experts of {} out without a word: `export --format peft` puts them together as it reads them",
                    config.family.architecture
                ));
            }
        }
        notices.extend(self.peft_notices(config));
        if config.tied_embeddings && self.trains_vocabulary() {
            notices.push(
            "embed_tokens and lm_head are one matrix in this model. The adapter changes each of them apart, as PEFT does without \
             ensure_weight_tying: a merged model has both, with tie_word_embeddings = false"
                .to_owned(),
            );
        }
        notices
    }

    /// What a user should know about branches that PEFT 0.21 takes for those of experts.
    pub fn peft_notices(&self, config: &ModelConfig) -> Vec<String> {
        let taken = || self.targets.iter().filter(|target| is_taken_for_expert(target, config));
        let Some(first) = taken().next() else { return Vec::new() };
        let (module, architecture) = (&first.module, config.family.architecture);
        let lost = taken().filter(|target| target.use_dora).count();
        let mut notices = Vec::new();
        if lost > 0 {
            notices.push(format!(
                "PEFT 0.21 does not load this adapter: it takes the names of {lost} layers of {architecture}, such as \
                 `{module}`, for those of experts, and has no DoRA there. --format merged writes the model with them"
            ));
        } else if self.dropout > 0.0 {
            notices.push(format!(
                "PEFT 0.21 loads branches of dense layers, shared experts and routers of {architecture}, such as \
                 `{module}`, without dropout alone: adapter_config.json has lora_dropout = 0, training uses {}",
                self.dropout
            ));
        }
        notices
    }
}

/// Whether PEFT 0.21 takes the name of a layer for that of experts. It goes by the last part, so it gives no branch
/// to dense layers, shared experts and routers of the families whose experts it puts together, if `target_modules`
/// names them. In `target_parameters` it takes them for what they are.
pub(crate) fn is_taken_for_expert(target: &LoraTarget, config: &ModelConfig) -> bool {
    let last = target.module.rsplit('.').next().unwrap_or(&target.module);
    config.family.peft_reads_experts()
        && !is_expert(&target.module)
        && ["gate", "gate_proj", "up_proj", "down_proj"].contains(&last)
}

/// The branches and modules of a recipe, for a model of this config.
///
/// # Errors
/// If a name, a pattern or a layer matches nothing, if settings contradict each other, or if a rank
/// is too large.
pub fn choose(lora: &Lora, config: &ModelConfig) -> Result<Adaptation, ModelError> {
    let saved = saved_modules(&lora.modules_to_save, config)?;
    if let Some(module) = saved.iter().find(|module| is_expert(module)) {
        let what = format!("`{module}` is an expert, and experts are trained by LoRA alone");
        return Err(ModelError::Lora { key: "modules_to_save", what });
    }
    if let Some(module) = saved.iter().find(|module| module.ends_with(".embed_tokens_per_layer")) {
        let what = format!("`{module}` is read from its file row by row, and stays as it is");
        return Err(ModelError::Lora { key: "modules_to_save", what });
    }
    let mut modules = choosable(config);
    // Where PEFT turns names of parts into experts, they mean those too; elsewhere `experts` does.
    let names_parts = !lora.experts
        && matches!(&lora.target_modules, TargetModules::Names(names)
        if !names.iter().any(|name| name.split('.').any(|part| part == EXPERTS)));
    if names_parts && !config.family.peft_reads_experts() {
        modules.retain(|module| !is_expert(module));
    }
    let targets = match config.wrapper {
        None => choose_targets(lora, &modules)?,
        // Patterns may be written for the names that modules have in the whole model, as PEFT sees them.
        Some(_) => match choose_targets(lora, &modules.iter().map(|module| name_inside(module)).collect::<Vec<_>>()) {
            Ok(targets) => targets
                .into_iter()
                .map(|target| LoraTarget { module: module_in_text(&target.module).into_owned(), ..target })
                .collect(),
            Err(_) => choose_targets(lora, &modules)?,
        },
    };
    let targets = of_single_experts(targets, config);
    if config.family.embedding_norm && targets.iter().any(|target| target.module == EMBEDDING) {
        let what = format!(
            "`{EMBEDDING}` of {} goes through a norm, and a branch beside that cannot be merged: name it in \
             modules_to_save, which trains it in full",
            config.family.architecture
        );
        return Err(ModelError::Lora { key: "target_modules", what });
    }
    if let Some(target) = targets.iter().find(|target| saved.contains(&target.module)) {
        let what = format!("`{}` gets a LoRA branch by target_modules, and is trained in full by this", target.module);
        return Err(ModelError::Lora { key: "modules_to_save", what });
    }
    Ok(Adaptation { targets, saved, dropout: lora.dropout })
}

/// All layers that may have a branch, in model order.
pub fn target_layers(config: &ModelConfig) -> Vec<TargetLayer> {
    let layer = |place: &Place<'_>| {
        let (outputs, inputs) = place.sizes();
        TargetLayer { module: place.module.to_owned(), outputs, inputs }
    };
    Decoder::new(config).places().iter().map(layer).collect()
}

/// The modules inside the decoder that a recipe chooses among, in model order. PEFT has one branch for all
/// experts of a layer of gpt-oss: of those the stacks, such as `model.layers.0.mlp.experts.down_proj`.
fn choosable(config: &ModelConfig) -> Vec<String> {
    let layers = target_layers(config).into_iter().map(|layer| layer.module);
    let modules = layers.filter(|module| !is_of_vocabulary(module));
    if !config.family.has_expert_parameters() {
        return modules.collect();
    }
    let mut seen = HashSet::new();
    modules.map(|module| stack_of(&module)).filter(|module| seen.insert(module.clone())).collect()
}

/// `L.mlp.experts.3.down_proj` without the number of the expert; any other module as it is.
pub(crate) fn stack_of(module: &str) -> String {
    match module.split_once(".experts.").and_then(|(layer, rest)| Some((layer, rest.split_once('.')?))) {
        Some((layer, (number, part))) if number.parse::<usize>().is_ok() => format!("{layer}.experts.{part}"),
        _ => module.to_owned(),
    }
}

/// Branches of stacks of experts, as those of single experts in model order.
fn of_single_experts(targets: LoraTargets, config: &ModelConfig) -> LoraTargets {
    if !config.family.has_expert_parameters() {
        return targets;
    }
    let targets: HashMap<String, LoraTarget> =
        targets.into_iter().map(|target| (target.module.clone(), target)).collect();
    let layers = target_layers(config).into_iter();
    layers
        .filter_map(|TargetLayer { module, .. }| {
            let target = targets.get(&stack_of(&module))?.clone();
            Some(LoraTarget { module, ..target })
        })
        .collect()
}

/// Whether a module is the embedding or the output layer.
pub(crate) fn is_of_vocabulary(module: &str) -> bool {
    [EMBEDDING, OUTPUT].contains(&module)
}

/// Whether a module is a projection of one of the experts that a router chooses among.
pub(crate) fn is_expert(module: &str) -> bool {
    module.contains(".experts.")
}

/// Whether a module is an expert's, or the router that chooses among them. Such are trained only if
/// they are named.
pub(crate) fn is_of_experts(module: &str) -> bool {
    is_expert(module) || is_router(module)
}

/// Whether a module chooses among experts.
pub(crate) fn is_router(module: &str) -> bool {
    [".mlp.gate", ".mlp.router", ".feed_forward.gate"].iter().any(|end| module.ends_with(end))
}

/// The module of a tensor.
pub(crate) fn module_of(tensor: &str) -> &str {
    tensor.rsplit_once('.').map_or(tensor, |(module, _)| module)
}

/// Name and shape of each tensor that is trained in full, in the order of the layout. A tied output
/// layer has a tensor of its own.
pub(crate) fn saved_tensors(config: &ModelConfig, adaptation: &Adaptation) -> Vec<(String, Vec<usize>)> {
    let untied =
        ModelConfig { tied_embeddings: config.tied_embeddings && !adaptation.trains_vocabulary(), ..config.clone() };
    let mut decoder = Decoder::new(&untied);
    let (base, _) = decoder.parameters();
    base.iter()
        .filter(|(_, slot)| adaptation.saves(slot.name()))
        .map(|(_, slot)| (slot.name().to_owned(), slot.shape()))
        .collect()
}

/// The modules whose name ends in one of these, as PEFT's `str.endswith`, or that lie inside of one
/// whose name does.
pub(crate) fn saved_modules(names: &[String], config: &ModelConfig) -> Result<Vec<String>, ModelError> {
    let untied = ModelConfig { tied_embeddings: false, ..config.clone() };
    let mut decoder = Decoder::new(&untied);
    let slots = decoder.slots();
    let mut modules: Vec<String> = Vec::new();
    // A mixture has tens of thousands of modules.
    let mut seen = HashSet::new();
    for module in slots.iter().map(|slot| module_of(slot.name())) {
        if seen.insert(module) {
            modules.push(module.to_owned());
        }
    }
    let refused = |what: String| Err(ModelError::Lora { key: "modules_to_save", what });
    for name in names {
        let mut found = modules.iter().flat_map(|module| around(module)).filter(|around| around.ends_with(name));
        match found.next() {
            None => {
                let known = list(&crate::lora::last_parts(&modules));
                return refused(format!("no module's name ends in `{name}`; the modules are called {known}"));
            }
            Some(module) if is_large(module) => {
                return refused(format!("`{name}` is the end of `{module}`, which holds whole layers"));
            }
            Some(_) => {}
        }
    }
    let is_saved = |module: &String| around(module).any(|around| names.iter().any(|name| around.ends_with(name)));
    Ok(modules.into_iter().filter(is_saved).collect())
}

/// A module and the modules that it lies in, such as `model`, `model.layers`, ...
fn around(module: &str) -> impl Iterator<Item = &str> {
    let ends = module.match_indices('.').map(|(end, _)| end).chain(std::iter::once(module.len()));
    ends.map(|end| &module[..end])
}

/// Whether a module holds one or more whole layers.
fn is_large(module: &str) -> bool {
    let last = module.rsplit('.').next().unwrap_or(module);
    ["model", "layers"].contains(&last) || last.parse::<usize>().is_ok()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Two layers, with one matrix for embedding and output layer.
    fn config() -> ModelConfig {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models/qwen2");
        ModelConfig::load(&path).expect("a config")
    }

    /// (names, the modules or a part of the error). PEFT matches ends of names, also within a word.
    #[test]
    fn modules_are_found_by_the_ends_of_their_names() {
        let layer = |part: &str| [0, 1].map(|n| format!("model.layers.{n}.{part}")).to_vec();
        let mut norms = Vec::new();
        for n in 0..2 {
            norms.push(format!("model.layers.{n}.input_layernorm"));
            norms.push(format!("model.layers.{n}.post_attention_layernorm"));
        }
        let with_last = [norms.clone(), vec!["model.norm".to_owned()]].concat();
        #[expect(clippy::type_complexity, reason = "a table of cases")]
        let cases: [(&[&str], Result<Vec<String>, &str>); 9] = [
            (&[], Ok(vec![])),
            (&["lm_head"], Ok(vec!["lm_head".to_owned()])),
            (&["lm_head", "embed_tokens"], Ok(vec![EMBEDDING.to_owned(), OUTPUT.to_owned()])),
            (&["k_proj"], Ok(layer("self_attn.k_proj"))),
            (&["layernorm"], Ok(norms)),
            (&["norm"], Ok(with_last)),
            (
                &["layers.1.mlp"],
                Ok(["gate", "up", "down"].map(|part| format!("model.layers.1.mlp.{part}_proj")).to_vec()),
            ),
            (&["w_proj"], Err("no module's name ends in `w_proj`")),
            (&["layers.1"], Err("holds whole layers")),
        ];
        for (names, want) in cases {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            match (saved_modules(&names, &config()), want) {
                (Ok(found), Ok(want)) => assert_eq!(found, want, "{names:?}"),
                (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{names:?}: {error}"),
                (found, want) => panic!("{names:?}: {found:?}, expected {want:?}"),
            }
        }
    }

    /// (target_modules of a gpt-oss of two layers and four experts, branches by part or a part of the error)
    #[test]
    fn experts_of_gpt_oss_are_chosen_by_their_stacks() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models/gpt_oss_experts");
        let config = ModelConfig::load(&path).expect("a config");
        let names = |list: &[&str]| TargetModules::Names(list.iter().map(|name| (*name).to_owned()).collect());
        let regex = |text: &str| TargetModules::Regex(text.to_owned());
        let lora = |target_modules: TargetModules| Lora {
            rank: 4,
            alpha: 8.0,
            dropout: 0.0,
            target_modules,
            experts: false,
            use_rslora: false,
            use_dora: false,
            rank_pattern: [("experts.down_proj".to_owned(), 2)].into(),
            alpha_pattern: std::collections::BTreeMap::new(),
            layers_to_transform: None,
            modules_to_save: vec![],
            init_from: None,
        };
        for (targets, want) in [
            (names(&["experts"]), Ok([8, 8, 0])),
            (names(&["q_proj", "mlp.experts.down_proj"]), Ok([0, 8, 2])),
            (names(&["v_proj", "model.layers.1.mlp.experts.gate_up_proj"]), Ok([4, 0, 2])),
            (regex(r".*\.1\..*experts.*"), Ok([4, 4, 0])),
            (names(&["down_proj"]), Err("`down_proj` matches no linear layer")),
            (names(&["experts.3.down_proj"]), Err("`experts.3.down_proj` matches no linear layer")),
        ] {
            let mut recipe = lora(targets.clone());
            if want != Ok([8, 8, 0]) {
                recipe.rank_pattern.clear();
            }
            match (choose(&recipe, &config), want) {
                (Ok(Adaptation { targets: chosen, .. }), Ok(counts)) => {
                    let of = |end: &str| chosen.iter().filter(|target| target.module.ends_with(end)).count();
                    let found =
                        [of(".gate_up_proj"), of(".down_proj"), chosen.len() - of(".gate_up_proj") - of(".down_proj")];
                    assert_eq!(found, counts, "{targets:?}");
                    let layers = target_layers(&config);
                    let place = |module: &str| layers.iter().position(|layer| layer.module == module);
                    assert!(chosen.is_sorted_by_key(|target| place(&target.module)), "{targets:?}: the model's order");
                    let pattern =
                        |target: &LoraTarget| !recipe.rank_pattern.is_empty() && target.module.ends_with(".down_proj");
                    assert!(chosen.iter().all(|target| target.rank == if pattern(target) { 2 } else { 4 }));
                }
                (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{targets:?}: {error}"),
                (found, want) => panic!("{targets:?}: {found:?}, expected {want:?}"),
            }
        }
        // `lora.experts` is the word in the list, beside whatever else is chosen.
        let attention = lora(names(&["q_proj"]));
        let (by_key, by_name) = (Lora { experts: true, ..attention.clone() }, lora(names(&["q_proj", "experts"])));
        assert_eq!(choose(&by_key, &config).expect("experts"), choose(&by_name, &config).expect("experts"));
        let all = Lora { experts: true, ..lora(TargetModules::AllLinear) };
        let chosen = choose(&all, &config).expect("experts").targets;
        assert_eq!(chosen.len(), 2 * (4 + 8));
        let without = ModelConfig::load(&path.with_file_name("qwen2")).expect("a config");
        let error = choose(&Lora { rank_pattern: Default::default(), ..all }, &without).expect_err("no experts");
        assert!(error.to_string().contains("the model has no experts"), "{error}");
        for (change, part) in [
            ((|lora: &mut Lora| lora.dropout = 0.1) as fn(&mut Lora), "neither DoRA nor dropout"),
            (|lora: &mut Lora| lora.use_dora = true, "neither DoRA nor dropout"),
        ] {
            let mut recipe = lora(names(&["experts"]));
            change(&mut recipe);
            assert!(choose(&recipe, &config).expect_err(part).to_string().contains(part));
        }
    }
}

//! What a recipe's adapter trains, and the adapter that its values come from.

use std::path::Path;

use finetune_model::adapter::{Adapter, BaseCheck};
use finetune_model::{Adaptation, ModelConfig, ModelError, choose, scheme_named};
use finetune_recipe::{Method, Recipe};

use crate::error::TrainError;
use crate::limits;
use crate::names::RESULTS;

/// What a recipe's adapter trains, and the values it starts from if the recipe names an adapter.
#[derive(Debug)]
pub(crate) struct InitialAdapter {
    /// The branches, and the modules trained in full.
    pub(crate) adaptation: Adaptation,
    /// The adapter that the values are taken from; `None` for fresh ones.
    pub(crate) adapter: Option<Adapter>,
    /// What is odd about the adapter to start from.
    pub(crate) notices: Vec<String>,
}

impl InitialAdapter {
    /// `None` if all weights are trained. `model`: the directory of the base model.
    pub(crate) fn read(
        recipe: &Recipe,
        config: &ModelConfig,
        model: &Path,
    ) -> Result<Option<InitialAdapter>, TrainError> {
        if recipe.train.method == Method::Full {
            return Ok(None);
        }
        let adaptation = choose(&recipe.lora, config)?;
        limits::check_targets(&adaptation.targets)?;
        let mut notices = adaptation.notices(config);
        let Some(path) = &recipe.lora.init_from else {
            return Ok(Some(InitialAdapter { adaptation, adapter: None, notices }));
        };
        // A run directory stands for the run's result.
        let is_adapter = path.join("adapter_config.json").is_file();
        let inside = path.join(RESULTS[0]);
        let path = if !is_adapter && inside.is_dir() { &inside } else { path };
        let adapter = Adapter::read(path, config)?;
        adapter.expect_adaptation(&adaptation, path)?;
        if adapter.rows != config.vocabulary {
            let what = format!(
                "the adapter's embedding has {} rows, that of this recipe {}: data.add_tokens has to add the same tokens",
                adapter.rows, config.vocabulary
            );
            return Err(ModelError::AdapterParts { path: path.clone(), what }.into());
        }
        notices.extend(adapter.notices.iter().cloned());
        let quantization = recipe.model.quantization.and_then(|quantization| scheme_named(quantization.as_str()));
        notices.extend(adapter.quantization_notice(quantization));
        match adapter.check_base(model)? {
            BaseCheck::Same | BaseCheck::Unknown => {}
            BaseCheck::OtherName(notice) => notices.push(notice),
            BaseCheck::Other(what) => return Err(TrainError::OtherBase { path: path.clone(), what }),
        }
        Ok(Some(InitialAdapter { adaptation, adapter: Some(adapter), notices }))
    }

    /// Whether the base's embedding stays as it is: it is not trained in full, and none comes with the adapter.
    pub(crate) fn keeps_embedding(&self) -> bool {
        self.adaptation.keeps_embedding() && !self.adapter.as_ref().is_some_and(Adapter::brings_vocabulary)
    }
}

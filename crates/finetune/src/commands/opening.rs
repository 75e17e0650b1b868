//! A model on its device with its adapter, for the commands that compute with one.

use std::path::Path;

use finetune_model::adapter::{Adapter, BaseCheck};
use finetune_model::{Model, ModelConfig, scheme_word};
use finetune_recipe::Quantization;
use finetune_trainer::{DevicePlan, ThisHost, stored_type};

use crate::cli::ModelArguments;
use crate::failure::Failure;
use crate::progress::Verbosity;
use crate::source::Source;

/// A line on stderr, unless only errors and results are asked for.
pub(super) fn say(verbosity: Verbosity, line: &str) {
    if verbosity > Verbosity::Quiet {
        crate::stderr::complain!("{line}");
    }
}

/// The model of a source, with its adapter attached. `say` gets lines that the user should see.
pub(super) fn open(source: &Source, arguments: &ModelArguments, say: &dyn Fn(&str)) -> Result<Model, Failure> {
    // First the adapter: reading the weights may take long.
    let adapter = match &source.adapter {
        Some(adapter) => Some(read_adapter(adapter, &source.model, arguments.force, say)?),
        None => None,
    };
    let trained_over = adapter.as_ref().and_then(|adapter| adapter.base.quantization);
    let as_trained = trained_over.and_then(|scheme| Quantization::from_text(scheme_word(scheme)));
    let quantization = arguments.quantization.map(Quantization::from).or(as_trained);
    let wanted = finetune_recipe::Model {
        path: source.model.to_string_lossy().into_owned(),
        device: arguments.device.into(),
        dtype: arguments.dtype.into(),
        quantization,
    };
    let family = ModelConfig::load(&source.model)?.family;
    let device_plan = DevicePlan::choose(&wanted, &ThisHost::default(), stored_type(&source.model), family)?;
    device_plan.notices.iter().for_each(|notice| say(notice));
    match (arguments.quantization, trained_over) {
        (None, Some(scheme)) => {
            say(&format!(
                "the base is packed as {} while it is loaded, as the adapter was trained",
                scheme_word(scheme)
            ));
        }
        (Some(asked), _) => {
            let notice = adapter.as_ref().and_then(|adapter| adapter.quantization_notice(Some(asked.into())));
            notice.iter().for_each(|notice| say(notice));
        }
        (None, None) => {}
    }
    let mut model = Model::load(&source.model, &device_plan.placement)?;
    model.notices().iter().for_each(|notice| say(notice));
    if let Some(adapter) = adapter {
        model.attach(&adapter)?;
    }
    Ok(model)
}

/// Reads an adapter for a base. An adapter that was trained on another base is refused.
pub(super) fn read_adapter(directory: &Path, base: &Path, force: bool, say: &dyn Fn(&str)) -> Result<Adapter, Failure> {
    let adapter = Adapter::read(directory, &ModelConfig::load(base)?)?;
    match adapter.check_base(base)? {
        BaseCheck::Same | BaseCheck::Unknown => {}
        BaseCheck::OtherName(notice) => say(&notice),
        BaseCheck::Other(what) if force => say(&format!("{what}; it is used all the same (--force)")),
        BaseCheck::Other(what) => {
            let hints = vec![
                "name the base that it was trained on".to_owned(),
                "--force uses this one all the same, for a base that is the same model in another number type"
                    .to_owned(),
            ];
            return Err(Failure::bad_input(what, hints));
        }
    }
    adapter.notices.iter().for_each(|notice| say(notice));
    Ok(adapter)
}

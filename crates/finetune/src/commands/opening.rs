//! A model on its device with its adapter, for the commands that compute with one.

use std::path::Path;

use finetune_model::adapter::{Adapter, BaseCheck};
use finetune_model::{
    BaseForm, FloatType, LayerSizes, Model, ModelConfig, OpenedBase, Placement, Scheme, scheme_word, slice_bytes,
};
use finetune_recipe::{Quantization, ResidencyChoice};
use finetune_trainer::{DevicePlan, ThisHost, Together, stored_type};

use crate::cli::{ModelArguments, ResidencyArgument};
use crate::commands::together::{connect, placed};
use crate::failure::Failure;
use crate::progress::Verbosity;
use crate::source::Source;
use crate::{allocator, disk_waits, memory, progress};

/// A line on stderr, unless only errors and results are asked for.
pub(super) fn say(verbosity: Verbosity, line: &str) {
    if verbosity > Verbosity::Quiet {
        crate::stderr::complain!("{line}");
    }
}

/// What a model is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// The losses of rows, many of which go through a layer together.
    Losses,
    /// Text, of which a pass has one token for each answer.
    Text,
}

/// The model of a source, with its adapter attached, and what this rank holds if several do it together. `say` gets
/// lines that the user should see.
pub(super) fn open(
    source: &Source,
    arguments: &ModelArguments,
    purpose: Purpose,
    together: Option<&Together>,
    say: &dyn Fn(&str),
) -> Result<Model, Failure> {
    // First the adapter: reading the weights may take long.
    let adapter = match &source.adapter {
        Some(adapter) => Some(read_adapter(adapter, &source.model, arguments.force, say)?),
        None => None,
    };
    let Opened { mut model, .. } = open_base(&source.model, arguments, purpose, adapter.as_ref(), together, say)?;
    if let Some(adapter) = adapter {
        model.attach(&adapter)?;
    }
    Ok(model)
}

/// A base in memory.
pub(super) struct Opened {
    pub(super) model: Model,
    /// Bytes of the weights that this process holds, if it reads none from the disk.
    pub(super) weights: u64,
}

/// The base model in a directory, packed as it was when `adapter` was trained on it. Nothing is
/// attached. `together`: the ranks that hold it together.
pub(super) fn open_base(
    directory: &Path,
    arguments: &ModelArguments,
    purpose: Purpose,
    adapter: Option<&Adapter>,
    together: Option<&Together>,
    say: &dyn Fn(&str),
) -> Result<Opened, Failure> {
    disk_waits::say_silence(together.map(|together| together.place().0), Verbosity::Normal);
    let trained_over = adapter.and_then(|adapter| adapter.base.quantization);
    let host = this_host(together);
    allocator::stay_within_share_of(&host);
    let device_plan = device_plan(directory, arguments, trained_over, &host)?;
    device_plan.notices.iter().for_each(|notice| say(notice));
    match (arguments.quantization, trained_over) {
        (None, Some(scheme)) => {
            say(&format!(
                "the base is packed as {} while it is loaded, as the adapter was trained",
                scheme_word(scheme)
            ));
        }
        (Some(asked), _) => {
            let notice = adapter.and_then(|adapter| adapter.quantization_notice(Some(asked.into())));
            notice.iter().for_each(|notice| say(notice));
        }
        (None, None) => {}
    }
    let device_plan = DevicePlan { placement: placed(device_plan.placement.clone(), together), ..device_plan };
    // Its headers are read once, for all that is asked about sizes and for loading.
    let base = OpenedBase::open(directory, device_plan.placement.quantization())?;
    let held = device_plan.placement.held(base.stored_type());
    let sizes = Sizes { form: base.form()?, config: base.config(), held };
    let placement = with_residency(directory, &sizes, arguments.residency, purpose, &device_plan, &host, say)?;
    let weights = sizes.weights(&placement);
    let mut model = Model::load_opened(base, &placement)?;
    connect(&mut model, together)?;
    model.notices().iter().for_each(|notice| say(notice));
    Ok(Opened { model, weights })
}

/// The device of a base on a host, packed as `trained_over` says unless the arguments say it.
pub(super) fn device_plan(
    directory: &Path,
    arguments: &ModelArguments,
    trained_over: Option<Scheme>,
    host: &ThisHost,
) -> Result<DevicePlan, Failure> {
    let as_trained = trained_over.and_then(|scheme| Quantization::from_text(scheme_word(scheme)));
    let wanted = finetune_recipe::Model {
        path: directory.to_string_lossy().into_owned(),
        device: arguments.device.into(),
        dtype: arguments.dtype.into(),
        quantization: arguments.quantization.map(Quantization::from).or(as_trained),
        residency: ResidencyChoice::Memory,
    };
    let family = ModelConfig::load(directory)?.family;
    Ok(DevicePlan::choose(&wanted, host, stored_type(directory), family)?)
}

/// The host, with this rank's place on it if several ranks hold the model.
fn this_host(together: Option<&Together>) -> ThisHost {
    let alone = || ThisHost { memory: memory::machine_bytes(), ..ThisHost::default() };
    together.map_or_else(alone, |together| together.host.clone())
}

/// What is known of the sizes of a base before it is loaded.
struct Sizes<'a> {
    form: BaseForm,
    config: &'a ModelConfig,
    /// What matrices that are not packed are held in.
    held: FloatType,
}

impl Sizes<'_> {
    /// The layers that a process holds, or parts of.
    fn layers(&self, placement: &Placement) -> impl Iterator<Item = &LayerSizes> {
        let stage = placement.stage();
        let is_mine = move |n: usize| stage.is_none_or(|stage| stage.holds(n));
        self.form.layers.iter().enumerate().filter(move |(n, _)| is_mine(*n)).map(|(_, layer)| layer)
    }

    /// Bytes of the layers that a process holds.
    fn layers_bytes(&self, placement: &Placement) -> u64 {
        match placement.slice() {
            Some(slice) => slice_bytes(self.config, &self.form, self.held, slice.count),
            None => self.layers(placement).map(|layer| layer.bytes(self.held)).sum(),
        }
    }

    /// Bytes of the weights that a process holds in memory, if it does not read its layers.
    fn weights(&self, placement: &Placement) -> u64 {
        self.layers_bytes(placement) + self.form.ends_bytes(self.held, false)
    }
}

/// The placement with its layers where `--residency` says. `auto` leaves on the disk what would take more than
/// four fifths of the memory. Experts are read one by one for text, and where two layers with all of theirs are too
/// large.
fn with_residency(
    model: &Path,
    sizes: &Sizes<'_>,
    residency: ResidencyArgument,
    purpose: Purpose,
    device_plan: &DevicePlan,
    host: &ThisHost,
    say: &dyn Fn(&str),
) -> Result<Placement, Failure> {
    let placement = device_plan.placement.clone();
    if residency == ResidencyArgument::Memory {
        check_room(model, sizes, device_plan, host)?;
        return Ok(placement);
    }
    let bytes = sizes.layers_bytes(&placement);
    let available = device_plan.memory(host);
    let is_too_large = available.is_some_and(|available| bytes > available - available / 5);
    if residency == ResidencyArgument::Auto && !is_too_large {
        return Ok(placement);
    }
    let whole = placement.clone().with_layers_from_disk(true);
    let one_by_one = whole.clone().with_experts_from_disk(true);
    // Two layers are in memory at a time.
    let mut largest: Vec<u64> = sizes.layers(&placement).map(|layer| layer.bytes(sizes.held)).collect();
    largest.sort_unstable_by(|a, b| b.cmp(a));
    let parts = placement.slice().map_or(1, |slice| slice.count as u64);
    let two = largest.iter().take(2).sum::<u64>() / parts + sizes.form.ends_bytes(sizes.held, true);
    let is_too_large = available.is_some_and(|available| two > available - available / 5);
    let has_experts = sizes.layers(&placement).any(|layer| layer.experts.bytes(sizes.held) > 0);
    // A token uses few of them: less is read than whole layers.
    let by_experts = has_experts && one_by_one.reads_experts() && (is_too_large || purpose == Purpose::Text);
    let (bytes, each) = (progress::bytes(bytes), if by_experts { ", experts one by one" } else { "" });
    say(&format!(
        "the layers, {bytes} in all, are read from the disk{each}: for each part of a prompt, for each token and for each group of rows"
    ));
    Ok(if by_experts { one_by_one } else { whole })
}

/// Refuses weights that the memory cannot hold: the system would kill the process without a word. Several ranks have
/// looked before.
fn check_room(model: &Path, sizes: &Sizes<'_>, device_plan: &DevicePlan, host: &ThisHost) -> Result<(), Failure> {
    let placement = &device_plan.placement;
    if placement.stage().is_some() || placement.slice().is_some() {
        return Ok(());
    }
    let weights = sizes.weights(placement);
    let Some(available) = device_plan.memory(host).filter(|available| weights > *available) else { return Ok(()) };
    let (weights, available) = (progress::bytes(weights), progress::bytes(available));
    let what = format!("{} takes {weights} of memory, and this process may have {available}", model.display());
    let mut hints = vec![
        "`finetune launch -n N -- serve` or `-- generate` spreads it over machines".to_owned(),
        "`finetune generate --residency disk` leaves its layers on the disk".to_owned(),
    ];
    if placement.quantization().is_none() {
        hints.insert(0, "--quantization packs a 16-bit model in fewer bits, such as mlx4 or int8".to_owned());
    }
    Err(Failure::no_space(what, hints))
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

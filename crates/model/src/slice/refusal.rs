//! Which models cannot be cut into slices, and what a slice takes.

use super::Slice;
use crate::adapter::Adapter;
use crate::config::{LayerConfig, MixerKind, ModelConfig, Values};
use crate::files::packing::BaseForm;
use crate::tree::{Decoder, Slot, Split};

/// Why so many processes cannot hold each layer of this model together, if they cannot.
pub fn not_in_slices(config: &ModelConfig, count: usize) -> Option<String> {
    let family = config.family.architecture;
    let other = config.layers.iter().find_map(|layer| match (layer.mixer, layer.values) {
        (MixerKind::Delta, _) => Some("gated delta nets"),
        (MixerKind::Convolution, _) => Some("short convolutions"),
        (_, Values::Keys) => Some("values that are the keys"),
        (_, Values::OfLayer(_)) => Some("keys and values of earlier layers"),
        _ => None,
    });
    if let Some(what) = other {
        return Some(format!("{family} has layers with {what}, which are not split over ranks"));
    }
    if config.query_key_norm && config.family.norms_all_heads {
        return Some(format!("{family} norms queries and keys of all heads together, which are not split over ranks"));
    }
    if fits(config, count) {
        return None;
    }
    let ways: Vec<String> = (2..=config.heads).filter(|&n| fits(config, n)).map(|n| n.to_string()).collect();
    let ways = match ways.as_slice() {
        [] => "no number of them does".to_owned(),
        [one] => format!("{one} do"),
        [first @ .., last] => format!("{} or {last} do", first.join(", ")),
    };
    let heads = config.heads;
    let keys = config.layers.iter().map(|layer| layer.key_value_heads).min().unwrap_or(config.key_value_heads);
    Some(format!("{heads} query heads with {keys} key/value heads do not split over {count} ranks; {ways}"))
}

/// Whether heads and feed-forward parts can be cut into so many slices.
fn fits(config: &ModelConfig, count: usize) -> bool {
    let has_even_keys = |layer: &LayerConfig| {
        let heads = layer.key_value_heads;
        layer.mixer == MixerKind::Latent || heads.is_multiple_of(count) || count.is_multiple_of(heads)
    };
    let of_experts = config.experts.as_ref().map(|experts| [Some(experts.intermediate_size), experts.shared]);
    let widths = config.layers.iter().filter(|layer| !layer.has_experts).map(|layer| layer.intermediate_size);
    let mut widths = widths.chain(of_experts.into_iter().flatten().flatten());
    config.heads.is_multiple_of(count) && config.layers.iter().all(has_even_keys) && widths.all(|width| width >= count)
}

/// Why a slice cannot have an adapter, if it cannot.
pub(crate) fn adapter_not_in_slices(config: &ModelConfig, adapter: &Adapter) -> Option<String> {
    let mut tree = Decoder::new(config);
    let of_inputs: Vec<String> = tree
        .linears()
        .filter(|linear| linear.role.split() == Split::Inputs)
        .map(|linear| linear.module.clone())
        .collect();
    let target = adapter.targets.iter().find(|target| target.use_dora && of_inputs.contains(&target.module))?;
    Some(format!("DoRA on `{}` needs norms over all of its inputs, which are split over ranks", target.module))
}

/// Bytes of the largest slice of the layers' matrices, from the headers of the base: about, where matrices are packed.
pub fn slice_bytes(config: &ModelConfig, form: &BaseForm, held: finetune_kernels::FloatType, count: usize) -> u64 {
    let layers: u64 = form.layers.iter().map(|layer| layer.bytes(held)).sum();
    let elements = |tree: &mut Decoder| -> u64 {
        let layers = tree.layers.iter_mut().flat_map(|layer| layer.slots());
        layers.filter(|slot| matches!(slot, Slot::Matrix(_))).map(|slot| slot.len() as u64).sum()
    };
    let all = elements(&mut Decoder::new(config));
    let of_slice = |mine: usize| {
        let mut tree = Decoder::new(config);
        tree.cut(Slice { mine, count });
        elements(&mut tree)
    };
    let largest = (0..count).map(of_slice).max().unwrap_or(all);
    (layers as f64 * largest as f64 / all.max(1) as f64).ceil() as u64
}

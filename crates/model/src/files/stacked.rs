//! Experts that a file holds in one tensor, as tensors of single experts; and other names that mlx-lm has
//! for parts of a layer.
//!
//! mlx-lm has a stack for each projection, `mlp.switch_mlp.gate_proj.weight` [e, f, hidden] (Gemma 4:
//! `experts.switch_glu`), and for each part of a packed one. transformers 5 has `mlp.experts.gate_up_proj`
//! [e, 2 f, hidden], the rows of the gate first, and `mlp.experts.down_proj` [e, hidden, f].

use std::borrow::Cow;

use finetune_store::{TensorPart, TensorSet, TensorView};

use crate::config::MOST_EXPERTS;
use crate::config::family::{ExpertLayout, Family, Names, OtherMixer};
use crate::files::wrapper;

/// Where mlx-lm's stacks are in a layer, and what is there in the place of it.
const STACKS: [(&str, &str); 2] = [(".switch_mlp.", ".experts."), (".experts.switch_glu.", ".experts.")];

/// What mlx-lm calls gate, up and down in every family with experts.
const GATED: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

/// What stands between a layer and a head's number in the names of what makes keys and values of latent attention.
pub(crate) const HEAD_KEYS: &str = ".self_attn.embed_q.";
pub(crate) const HEAD_VALUES: &str = ".self_attn.unembed_out.";

/// How the name of a delta net's convolution ends.
const DELTA_CONVOLUTION: &str = ".conv1d.weight";

/// Whether files of this family have norms to which 1 was added, as mlx-lm writes them. It tells them by the
/// shape of the convolutions beside them, which it turns at the same time.
pub(crate) fn has_one_in_norms(files: &TensorSet, family: &Family) -> bool {
    let is_turned = |view: TensorView<'_>| {
        view.name.ends_with(DELTA_CONVOLUTION) && matches!(*view.shape, [_, taps, 1] if taps > 1)
    };
    family.has_one_in_mlx_files() && files.names().filter_map(|name| files.get(name)).any(is_turned)
}

/// What a tensor of the files is read as: the experts of a stack, and of a multimodal model the text
/// model's tensors under the names that they have in it.
pub(crate) fn read_as(view: &TensorView<'_>, is_wrapped: bool, family: &Family) -> Option<Vec<TensorPart>> {
    let name = if is_wrapped { wrapper::name_in_text(view.name) } else { Some(view.name.into()) };
    let Some(name) = name else { return Some(Vec::new()) };
    let name = if family.mixture.is_some() { name_in_model(name, &family.names) } else { name };
    let whole = |shape| vec![TensorPart { name: name.to_string(), shape, first: 0 }];
    // A depthwise convolution is [channels, 1, taps]. mlx-lm has [channels, taps, 1].
    let is_short = name.ends_with(".conv.conv.weight") && family.other_mixer == OtherMixer::Convolution;
    if let [_, before, behind] = *view.shape
        && (is_short || name.ends_with(DELTA_CONVOLUTION))
        && (before == 1 || behind == 1)
    {
        return Some(whole(vec![view.shape.iter().product()]));
    }
    let is_plain = family.expert_layout() == ExpertLayout::Plain;
    let of_experts = if is_plain { parts(&name, view, &family.names) } else { None };
    let of_heads = || if family.latent.is_some() { of_heads(&name, view) } else { None };
    of_experts.or_else(of_heads).or_else(|| (name != view.name).then(|| whole(view.shape.to_vec())))
}

/// The tensors of single experts that this one, of this name in the model, is made of. `None`: it is no
/// stack of experts.
fn parts(name: &str, view: &TensorView<'_>, names: &Names) -> Option<Vec<TensorPart>> {
    let (&experts, inner) = view.shape.split_first().filter(|(experts, _)| **experts <= MOST_EXPERTS)?;
    let &rows = inner.first()?;
    let each: usize = inner.iter().product();
    let part = |name: String, shape: Vec<usize>, first: usize| TensorPart { name, shape, first };
    let of_mlx = STACKS.iter().find_map(|(stack, place)| Some((name.split_once(stack)?, place)));
    if let Some(((layer, rest), place)) = of_mlx {
        let rest = ours(rest, names);
        let of_expert = |expert| part(format!("{layer}{place}{expert}.{rest}"), inner.to_vec(), expert * each);
        return Some((0..experts).map(of_expert).collect());
    }
    let (experts_of_layer, stack) = name.rsplit_once('.')?;
    if !experts_of_layer.ends_with(".experts") || inner.len() != 2 {
        return None;
    }
    let weight = |expert: usize, part: &str| format!("{experts_of_layer}.{expert}.{part}.weight");
    match stack {
        "down_proj" => {
            let down = |expert| part(weight(expert, names.gated[2]), inner.to_vec(), expert * each);
            Some((0..experts).map(down).collect())
        }
        "gate_up_proj" if rows.is_multiple_of(2) => {
            let shape = vec![rows / 2, inner[1]];
            let halves = |expert: usize| {
                let first = expert * each;
                [
                    part(weight(expert, names.gated[0]), shape.clone(), first),
                    part(weight(expert, names.gated[1]), shape.clone(), first + each / 2),
                ]
            };
            Some((0..experts).flat_map(halves).collect())
        }
        _ => None,
    }
}

/// The matrices of single heads that mlx-lm's stack of them is made of, packed or not. `None`: it is none.
fn of_heads(name: &str, view: &TensorView<'_>) -> Option<Vec<TensorPart>> {
    let &[heads, rows, columns] = view.shape else { return None };
    let (stack, (layer, rest)) =
        [HEAD_KEYS, HEAD_VALUES].into_iter().find_map(|stack| Some((stack, name.split_once(stack)?)))?;
    let head = |head: usize| TensorPart {
        name: format!("{layer}{stack}{head}.{rest}"),
        shape: vec![rows, columns],
        first: head * rows * columns,
    };
    (heads <= MOST_EXPERTS).then(|| (0..heads).map(head).collect())
}

/// The name in the model of a tensor that mlx-lm calls by another: gate, up and down of a dense part
/// (LFM2-MoE). Other names stay.
fn name_in_model<'n>(name: Cow<'n, str>, names: &Names) -> Cow<'n, str> {
    if names.gated == GATED {
        return name;
    }
    let dense = format!(".{}.", names.feed_forward);
    match name.split_once(&dense) {
        Some((layer, rest)) if !rest.starts_with("switch_mlp.") => {
            format!("{layer}{dense}{}", ours(rest, names)).into()
        }
        _ => name,
    }
}

/// `gate_proj.weight` with the family's name of the gate; likewise up and down. Other names stay.
fn ours(rest: &str, names: &Names) -> String {
    let (first, end) = rest.split_once('.').unwrap_or((rest, ""));
    let known = GATED.iter().zip(names.gated).find(|(theirs, _)| **theirs == first);
    known.map_or_else(|| rest.to_owned(), |(_, ours)| format!("{ours}.{end}"))
}

//! Experts that a file holds in one tensor, as tensors of single experts.
//!
//! mlx-lm has a stack for each projection, `mlp.switch_mlp.gate_proj.weight` [e, f, hidden], and for each
//! part of a packed one. transformers 5 has `mlp.experts.gate_up_proj` [e, 2 f, hidden], the rows of the
//! gate first, and `mlp.experts.down_proj` [e, hidden, f].

use finetune_store::{TensorPart, TensorView};

use crate::config::MOST_EXPERTS;
use crate::config::family::{ExpertLayout, Family};
use crate::files::wrapper;

/// What a tensor of the files is read as: the experts of a stack, and of a multimodal model the text
/// model's tensors under the names that they have in it.
pub(crate) fn of_view(view: &TensorView<'_>, is_wrapped: bool, family: &Family) -> Option<Vec<TensorPart>> {
    let name = if is_wrapped { wrapper::name_in_text(view.name) } else { Some(view.name.into()) };
    let Some(name) = name else { return Some(Vec::new()) };
    let whole = |shape| vec![TensorPart { name: name.to_string(), shape, first: 0 }];
    // A depthwise convolution is [channels, 1, taps]. mlx-lm has [channels, taps, 1], and norms to which 1
    // was added: such a file is refused by this shape.
    let is_convolution = name.ends_with(".conv1d.weight") || name.ends_with(".conv.conv.weight");
    if is_convolution && view.shape.len() == 3 && view.shape[1] == 1 {
        return Some(whole(vec![view.shape.iter().product()]));
    }
    let is_plain = family.expert_layout() == ExpertLayout::Plain;
    let of_experts = if is_plain { parts(&name, view, family.names.gated) } else { None };
    of_experts.or_else(|| (name != view.name).then(|| whole(view.shape.to_vec())))
}

/// The tensors of single experts that this one, of this name in the model, is made of. `None`: it is no
/// stack of experts.
/// `gated`: what the family calls gate, up and down.
fn parts(name: &str, view: &TensorView<'_>, gated: [&str; 3]) -> Option<Vec<TensorPart>> {
    let (&experts, inner) = view.shape.split_first().filter(|(experts, _)| **experts <= MOST_EXPERTS)?;
    let &rows = inner.first()?;
    let each: usize = inner.iter().product();
    let part = |name: String, shape: Vec<usize>, first: usize| TensorPart { name, shape, first };
    if let Some((layer, rest)) = name.split_once(".switch_mlp.") {
        let of_expert = |expert| part(format!("{layer}.experts.{expert}.{rest}"), inner.to_vec(), expert * each);
        return Some((0..experts).map(of_expert).collect());
    }
    let (experts_of_layer, stack) = name.rsplit_once('.')?;
    if !experts_of_layer.ends_with(".experts") || inner.len() != 2 {
        return None;
    }
    let weight = |expert: usize, part: &str| format!("{experts_of_layer}.{expert}.{part}.weight");
    match stack {
        "down_proj" => {
            let down = |expert| part(weight(expert, gated[2]), inner.to_vec(), expert * each);
            Some((0..experts).map(down).collect())
        }
        "gate_up_proj" if rows.is_multiple_of(2) => {
            let shape = vec![rows / 2, inner[1]];
            let halves = |expert: usize| {
                let first = expert * each;
                [
                    part(weight(expert, gated[0]), shape.clone(), first),
                    part(weight(expert, gated[1]), shape.clone(), first + each / 2),
                ]
            };
            Some((0..experts).flat_map(halves).collect())
        }
        _ => None,
    }
}

//! The trained parameters, in one fixed order: what gradients, moments and checkpoints are laid out by.

use std::ops::Range;

/// One trained tensor: its name in the files, its shape, and where it lies in the flat vector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    pub name: String,
    pub shape: Vec<usize>,
    pub range: Range<usize>,
}

/// All trained parameters in model order. Gradients, moments and sums over ranks are flat `[f32]` of
/// [`Layout::len`] elements in this order.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Layout {
    parameters: Vec<Parameter>,
}

impl Layout {
    pub(crate) fn push(&mut self, name: String, shape: Vec<usize>) {
        let start = self.len();
        let range = start..start + shape.iter().product::<usize>();
        self.parameters.push(Parameter { name, shape, range });
    }

    /// The same tensors once for each prefix, as `prefix.name`: how optimizer moments are stored.
    pub fn repeated(&self, prefixes: &[&str]) -> Layout {
        let mut layout = Layout::default();
        for prefix in prefixes {
            for parameter in &self.parameters {
                layout.push(format!("{prefix}.{}", parameter.name), parameter.shape.clone());
            }
        }
        layout
    }

    /// Elements of all parameters together.
    pub fn len(&self) -> usize {
        self.parameters.last().map_or(0, |last| last.range.end)
    }

    pub fn is_empty(&self) -> bool {
        self.parameters.is_empty()
    }

    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Parameter> {
        self.parameters.iter()
    }

    /// blake3 of names and shapes in order, in hexadecimal: ranks and checkpoints must agree on it.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for Parameter { name, shape, .. } in &self.parameters {
            hasher.update(format!("{name} {shape:?}\n").as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }
}

//! The trained parameters in one fixed order: the layout of gradients, moments and checkpoints.

use std::ops::Range;

/// One trained tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Its name in the files.
    pub name: String,
    /// Its dimensions, row-major.
    pub shape: Vec<usize>,
    /// Its elements in the flat vector.
    pub range: Range<usize>,
}

/// All trained parameters in model order. Gradients, moments and sums over ranks are flat `[f32]`
/// of [`Layout::len`] elements in this order.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Layout {
    parameters: Vec<Parameter>,
}

impl Layout {
    /// Adds a tensor behind the others.
    pub fn push(&mut self, name: String, shape: Vec<usize>) {
        let start = self.len();
        let range = start..start + shape.iter().product::<usize>();
        self.parameters.push(Parameter { name, shape, range });
    }

    /// The same tensors once for each prefix, as `prefix.name`. Optimizer moments are stored so.
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

    /// Whether nothing is trained.
    pub fn is_empty(&self) -> bool {
        self.parameters.is_empty()
    }

    /// The parameters in their order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Parameter> {
        self.parameters.iter()
    }

    pub(crate) fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// BLAKE3 of names and shapes in order, in hexadecimal. Ranks and checkpoints must agree on it.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for Parameter { name, shape, .. } in &self.parameters {
            hasher.update(format!("{name} {shape:?}\n").as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }
}

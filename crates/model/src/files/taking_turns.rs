//! gpt-oss's experts: stacks of all experts of a layer, in which gate and up take turns.
//!
//! ```text
//! mlp.experts.gate_up_proj        [e, hidden, 2 f]      columns 0, 2, .. are the gate's
//! mlp.experts.gate_up_proj_bias   [e, 2 f]
//! mlp.experts.down_proj           [e, f, hidden]
//! mlp.experts.down_proj_bias      [e, hidden]
//! ```
//!
//! Or, in MXFP4, with the rows of a matrix [o, i]:
//!
//! ```text
//! mlp.experts.gate_up_proj_blocks U8 [e, 2 f, hidden / 32, 16]   _scales U8 [e, 2 f, hidden / 32]
//! mlp.experts.down_proj_blocks    U8 [e, hidden, f / 32, 16]     _scales U8 [e, hidden, f / 32]
//! ```

use std::sync::{Arc, Mutex, PoisonError};

use finetune_packed::PackedMatrix;
use finetune_packed::files::mxfp4_blocks;
use finetune_store::{Dtype, TensorSet, TensorView};
use rayon::prelude::*;

use crate::error::ModelError;
use crate::files::floats::{float_type, to_finite_f32_of};

/// The one form that such stacks are packed in.
pub(crate) const FORMAT: &str = "MXFP4";

/// Slices of stacks that gate or up was read from, kept for the other one: each is read once.
#[derive(Default)]
pub(crate) struct Slices {
    /// Of MXFP4.
    bytes: Kept<u8>,
    /// Of dense stacks.
    values: Kept<f32>,
}

/// The slices of some experts, by stack and expert, the oldest first.
struct Kept<T>(Mutex<Vec<KeptSlice<T>>>);

/// A stack's name, an expert's number and its slice.
type KeptSlice<T> = ((String, usize), Arc<Vec<T>>);

/// As many as threads read layers: what one of them reads is taken when the next matrix is read.
const MOST_KEPT: usize = 4;

impl<T> Default for Kept<T> {
    fn default() -> Self {
        Kept(Mutex::default())
    }
}

impl<T> Kept<T> {
    /// The slice of an expert, read or taken. `is_shared`: whether another matrix will ask for it.
    fn take(
        &self,
        stack: &str,
        expert: usize,
        is_shared: bool,
        read: impl FnOnce() -> Result<Vec<T>, ModelError>,
    ) -> Result<Arc<Vec<T>>, ModelError> {
        let kept = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = {
            let mut kept = kept();
            let place = kept.iter().position(|((name, number), _)| (name.as_str(), *number) == (stack, expert));
            place.map(|place| kept.remove(place).1)
        };
        if let Some(slice) = taken {
            return Ok(slice);
        }
        let slice: Arc<Vec<T>> = Arc::new(read()?);
        if is_shared {
            let mut kept = kept();
            if kept.len() == MOST_KEPT {
                kept.remove(0);
            }
            kept.push(((stack.to_owned(), expert), slice.clone()));
        }
        Ok(slice)
    }
}

/// A tensor of a single expert, in a stack of all.
pub(crate) struct OfStack<'a> {
    slices: &'a Slices,
    stack: TensorView<'a>,
    /// Of a matrix in MXFP4.
    scales: Option<TensorView<'a>>,
    expert: usize,
    /// [o] or [o, i]
    shape: Vec<usize>,
    /// The first of its outputs in the stack, and how many outputs lie from one to the next.
    first: usize,
    step: usize,
}

impl<'a> OfStack<'a> {
    /// The tensor of this name, such as `model.layers.0.mlp.experts.3.up_proj.weight`. `None`: it is none of
    /// an expert, or the files have no stack of it.
    ///
    /// # Errors
    /// If a stack has another shape or number type.
    pub(crate) fn find(
        files: &'a TensorSet,
        slices: &'a Slices,
        name: &str,
        shape: &[usize],
    ) -> Result<Option<Self>, ModelError> {
        let Some((experts, expert, part, half)) = split(name) else { return Ok(None) };
        let Some((stack, first, step)) = place(part) else { return Ok(None) };
        let stack = format!("{experts}.{stack}");
        let get = |end: &str| files.get(&format!("{stack}{end}"));
        let of = |view: TensorView<'a>, scales: Option<TensorView<'a>>| OfStack {
            slices,
            stack: view,
            scales,
            expert,
            shape: shape.to_vec(),
            first,
            step,
        };
        let outputs = shape[0] * step;
        let check = |view: &TensorView<'_>, inner: &[usize], is_codes: bool| {
            let fits = view.shape.split_first().is_some_and(|(&count, rest)| expert < count && rest == inner);
            let is_read = if is_codes { view.dtype == Dtype::U8 } else { float_type(view.dtype).is_some() };
            let (path, name) = (view.path().to_owned(), view.name.to_owned());
            match (fits, is_read) {
                (true, true) => Ok(()),
                (true, false) => Err(ModelError::Dtype { path, name, dtype: view.dtype.to_string() }),
                (false, _) => {
                    let expected = std::iter::once(expert + 1).chain(inner.iter().copied()).collect();
                    Err(ModelError::Shape { path, name, found: view.shape.to_vec(), expected })
                }
            }
        };
        match (half, shape) {
            ("bias", &[_]) => {
                let Some(view) = get("_bias") else { return Ok(None) };
                check(&view, &[outputs], false)?;
                Ok(Some(of(view, None)))
            }
            ("weight", &[_, inputs]) => {
                if let Some(view) = get("") {
                    check(&view, &[inputs, outputs], false)?;
                    return Ok(Some(of(view, None)));
                }
                let (Some(codes), Some(scales)) = (get("_blocks"), get("_scales")) else { return Ok(None) };
                check(&codes, &[outputs, inputs.div_ceil(32), 16], true)?;
                check(&scales, &[outputs, inputs.div_ceil(32)], true)?;
                Ok(Some(of(codes, Some(scales))))
            }
            _ => Ok(None),
        }
    }

    /// Whether its elements have a few bits each.
    pub(crate) fn is_packed(&self) -> bool {
        self.scales.is_some()
    }

    /// The number type of its elements; `None` of packed ones.
    pub(crate) fn dtype(&self) -> Option<Dtype> {
        (!self.is_packed()).then_some(self.stack.dtype)
    }

    /// The stack, for messages.
    pub(crate) fn view(&self) -> &TensorView<'a> {
        &self.stack
    }

    /// The expert that it is of.
    pub(crate) fn expert(&self) -> usize {
        self.expert
    }

    /// The stack without the ending of its packed form.
    pub(crate) fn matrix(&self) -> &str {
        self.stack.name.strip_suffix("_blocks").unwrap_or(self.stack.name)
    }

    /// Names of the stacks that it is a part of.
    pub(crate) fn stacks(&self) -> Vec<String> {
        std::iter::once(&self.stack).chain(&self.scales).map(|view| view.name.to_owned()).collect()
    }

    /// Bytes of the packed matrix in memory; 0 of a dense one.
    pub(crate) fn packed_bytes(&self) -> u64 {
        let elements = self.shape.iter().product::<usize>() as u64;
        if self.is_packed() { elements / 2 + elements / 32 } else { 0 }
    }

    /// The packed matrix. `None`: it is dense.
    ///
    /// # Errors
    /// If the file cannot be read, or a scale is NaN.
    pub(crate) fn packed(&self) -> Result<Option<PackedMatrix>, ModelError> {
        let (Some(scales), &[outputs, inputs]) = (&self.scales, self.shape.as_slice()) else { return Ok(None) };
        let rows = |view: &TensorView<'_>, width: usize| -> Result<Vec<u8>, ModelError> {
            let all = outputs * self.step;
            let read = || Ok(view.bytes_at(self.expert * all * width, all * width)?);
            let bytes = self.slices.bytes.take(view.name, self.expert, self.step > 1, read)?;
            let own = bytes.chunks(width).skip(self.first).step_by(self.step);
            Ok(own.flatten().copied().collect())
        };
        let groups = inputs.div_ceil(32);
        let matrix = mxfp4_blocks(rows(&self.stack, 16 * groups)?, rows(scales, groups)?, [outputs, inputs]);
        Ok(Some(matrix.map_err(|error| error.of(self.stack.name, Some(self.stack.path())))?))
    }

    /// All elements of a dense tensor in f32.
    ///
    /// # Errors
    /// If the file cannot be read, or a number is not finite.
    pub(crate) fn values(&self) -> Result<Vec<f32>, ModelError> {
        let Self { step, first, .. } = *self;
        let (outputs, inputs) = (self.shape[0], self.shape.get(1).copied().unwrap_or(1));
        let columns = outputs * step;
        let read = || to_finite_f32_of(&self.stack, self.expert * inputs * columns, inputs * columns);
        let all = self.slices.values.take(self.stack.name, self.expert, step > 1, read)?;
        let mut values = vec![0.0; outputs * inputs];
        values.par_chunks_mut(inputs).enumerate().for_each(|(output, row)| {
            for (input, value) in row.iter_mut().enumerate() {
                *value = all[input * columns + output * step + first];
            }
        });
        Ok(values)
    }
}

/// The stack that a matrix of single experts is in, the first of its outputs there, and how many outputs lie from
/// one to the next.
fn place(part: &str) -> Option<(&'static str, usize, usize)> {
    match part {
        "gate_proj" => Some(("gate_up_proj", 0, 2)),
        "up_proj" => Some(("gate_up_proj", 1, 2)),
        "down_proj" => Some(("down_proj", 0, 1)),
        _ => None,
    }
}

/// The matrix of a stack that the matrix of this name is in, such as `L.mlp.experts.3.gate_up_proj.weight`, and its
/// outputs there as in [`place`]. `None`: it is none of an expert.
pub(crate) fn matrix_of_stack(name: &str) -> Option<(String, usize, usize)> {
    let (experts, expert, part, half) = split(name)?;
    let (stack, first, step) = place(part).filter(|_| half == "weight")?;
    Some((format!("{experts}.{expert}.{stack}.weight"), first, step))
}

/// The outputs of one matrix, [outputs / step, inputs], of one of a stack [inputs, outputs].
pub(crate) fn outputs_of(values: &[f32], inputs: usize, first: usize, step: usize) -> Vec<f32> {
    let columns = values.len() / inputs.max(1);
    let output = |output: usize| (0..inputs).map(move |input| values[input * columns + output]);
    (first..columns).step_by(step).flat_map(output).collect()
}

/// `L.mlp.experts.N.PART.HALF` as (`L.mlp.experts`, N, PART, HALF).
fn split(name: &str) -> Option<(&str, usize, &str, &str)> {
    let (rest, half) = name.rsplit_once('.')?;
    let (rest, part) = rest.rsplit_once('.')?;
    let (experts, number) = rest.rsplit_once('.')?;
    Some((experts, number.parse().ok()?, part, half)).filter(|_| experts.ends_with(".experts"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two inputs, four outputs: those of the gate are the first and third.
    #[test]
    fn a_matrix_out_of_a_stack() {
        let name = "model.layers.0.mlp.experts.3.up_proj.weight";
        let stack = "model.layers.0.mlp.experts.3.gate_up_proj.weight".to_owned();
        assert_eq!(matrix_of_stack(name), Some((stack, 1, 2)));
        assert_eq!(matrix_of_stack("model.layers.0.mlp.experts.3.up_proj.bias"), None);
        assert_eq!(matrix_of_stack("model.layers.0.mlp.up_proj.weight"), None);
        let values = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0];
        assert_eq!(outputs_of(&values, 2, 0, 2), [0.0, 4.0, 2.0, 6.0]);
        assert_eq!(outputs_of(&values, 2, 1, 2), [1.0, 5.0, 3.0, 7.0]);
        assert_eq!(outputs_of(&values, 2, 0, 1), [0.0, 4.0, 1.0, 5.0, 2.0, 6.0, 3.0, 7.0]);
    }

    /// (stack, expert, whether another matrix asks too, reads so far)
    #[test]
    fn a_slice_of_gate_and_up_is_read_once() {
        let kept = Kept::<u8>::default();
        let reads = std::cell::Cell::new(0_u8);
        for (stack, expert, is_shared, want) in [
            ("gate_up", 0, true, 1),
            ("gate_up", 0, true, 1),
            ("gate_up", 0, true, 2),
            ("gate_up", 1, true, 3),
            ("scales", 1, true, 4),
            ("gate_up", 0, true, 4),
            ("down", 0, false, 5),
            ("down", 0, false, 6),
        ] {
            let read = || {
                reads.set(reads.get() + 1);
                Ok(vec![expert as u8])
            };
            let slice = kept.take(stack, expert, is_shared, read).expect("a slice");
            assert_eq!((slice.as_slice(), reads.get()), (&[expert as u8][..], want), "{stack} {expert}");
        }
        // No more are kept than a few.
        for expert in 0..10 {
            kept.take("many", expert, true, || Ok(vec![0])).expect("a slice");
        }
        assert_eq!(kept.0.lock().expect("no panic").len(), MOST_KEPT);
    }
}

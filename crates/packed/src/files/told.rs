//! What config.json alone tells of a weight whose tensors are not here: its format, and the bytes that it will take in
//! memory.
//!
//! Which modules are packed is the rule of the program that packs: bitsandbytes and FP8 of transformers pack linear
//! layers, but for those that a list names, and for the output layer; compressed-tensors those that a group's `targets`
//! name and `ignore` does not; MLX all matrices, embeddings too, whose columns fill its groups. Routers stay as they
//! are, but for MLX's that are linear layers. Formats whose tensors alone say it are not told.

use super::config::{Bitsandbytes, Gptq, Method, Mlx, MlxForm, PackedConfig, Scheme};
use super::pattern::Pattern;
use super::scaled::arranged;
use super::{Format, Scales};
use crate::quantize::{self, Stored};

/// The group of GPTQ and AWQ if config.json says none.
const GROUP: usize = 128;
/// A table of 16 numbers in f32, and one of 256.
const TABLE_OF_4_BITS: u64 = 4 * 16;
const TABLE_OF_8_BITS: u64 = 4 * 256;

/// Where a weight is in its model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// An embedding, or another table of rows.
    Embedding,
    /// The output layer.
    Output,
    /// What chooses among experts. `is_linear`: it is a linear layer in MLX.
    Router {
        /// Whether it is.
        is_linear: bool,
    },
    /// An expert's matrix.
    Expert,
    /// Keys and values of latent attention, which MLX makes other matrices of.
    Latent,
    /// Another linear layer.
    Linear,
}

/// A weight of a model.
#[derive(Clone, Copy, Debug)]
pub struct Weight<'a> {
    /// The names of its module that config.json may call it by.
    pub names: &'a [String],
    /// What mlx-lm calls it.
    pub in_mlx: &'a str,
    /// `[o, i]`
    pub shape: [usize; 2],
    /// Where it is.
    pub place: Place,
}

/// How the weights of a model are packed, as far as config.json alone tells it.
#[derive(Debug)]
pub struct Told<'a> {
    how: How<'a>,
    /// The modules that stay as they are. `None`: no list is there.
    plain: Option<Vec<Pattern>>,
    /// The type that scales have where their format leaves it open.
    stored: Stored,
}

#[derive(Debug)]
enum How<'a> {
    Mlx(&'a Mlx),
    Bitsandbytes(Bitsandbytes),
    Gptq(&'a Gptq, usize),
    Awq(Option<usize>),
    Compressed(Vec<(Vec<Pattern>, &'a Scheme)>),
    Fp8(Option<[usize; 2]>),
    Mxfp4,
}

impl PackedConfig {
    /// What it alone tells of weights whose plain numbers are in this type. `None`: it names no packed format, or one
    /// whose tensors are needed to tell.
    pub fn told(&self, stored: Stored) -> Option<Told<'_>> {
        let is_compressed = matches!(self.method(), Some(Method::Compressed { .. }));
        let pattern = if is_compressed { Pattern::of_compressed } else { Pattern::of_transformers };
        let plain = self.plain.as_ref().map(|names| names.iter().map(|name| pattern(name)).collect());
        let how = match (&self.mlx, self.method()) {
            (Some(mlx), _) => {
                let mut forms = mlx.modules.values().flatten().chain([&mlx.all]);
                forms.all(|form| mlx_size(form, [1, form.group], stored).is_some()).then_some(How::Mlx(mlx))?
            }
            (None, None | Some(Method::Other { .. } | Method::Foreign(_))) => return None,
            (None, Some(Method::Bitsandbytes { form, .. })) => How::Bitsandbytes(*form),
            (None, Some(Method::Gptq(gptq))) => {
                let is_told = |bits: &usize| matches!(bits, 2 | 3 | 4 | 8) && !gptq.dynamic;
                How::Gptq(gptq, gptq.bits.filter(is_told)?)
            }
            (None, Some(Method::Awq { group })) => How::Awq(*group),
            (None, Some(Method::Fp8 { block })) => How::Fp8(*block),
            (None, Some(Method::Mxfp4)) => How::Mxfp4,
            (None, Some(Method::Compressed { schemes, .. })) => {
                let is_known = |scheme: &Scheme| Packing::of(scheme).is_some();
                let targets = |scheme: &Scheme| {
                    scheme.targets.iter().map(|name| Pattern::of_compressed(name)).collect::<Vec<_>>()
                };
                let known = !schemes.is_empty() && schemes.iter().all(is_known);
                known.then(|| How::Compressed(schemes.iter().map(|scheme| (targets(scheme), scheme)).collect()))?
            }
        };
        Some(Told { how, plain, stored })
    }
}

impl Told<'_> {
    /// The format of a weight, and its bytes in memory. `None`: it stays as it is.
    pub fn of(&self, weight: &Weight<'_>) -> Option<(Format, u64)> {
        let [rows, columns] = weight.shape;
        // No product below overflows.
        rows.checked_mul(columns)?.checked_mul(64).filter(|bits| *bits > 0)?;
        if let How::Mlx(mlx) = &self.how {
            let own = mlx.modules.get(weight.in_mlx);
            let form = match (own, weight.place) {
                (Some(own), _) => own.as_ref()?,
                (None, Place::Router { is_linear: false } | Place::Latent) => return None,
                // mlx-lm asks so before it looks at a module's own groups.
                (None, _) => Some(&mlx.all).filter(|form| columns.is_multiple_of(form.group))?,
            };
            return mlx_size(form, weight.shape, self.stored);
        }
        if matches!(weight.place, Place::Embedding | Place::Router { .. }) || self.is_plain(weight) {
            return None;
        }
        match &self.how {
            How::Mlx(_) => None,
            How::Bitsandbytes(form) => Some(bitsandbytes_size(*form, weight.shape)),
            How::Gptq(gptq, bits) => self.gptq_size(gptq, *bits, weight),
            How::Awq(group) => Some(self.awq_size(*group, weight.shape)),
            How::Compressed(schemes) => {
                let is_meant = |targets: &[Pattern]| {
                    let by_name = || weight.names.iter().any(|name| targets.iter().any(|target| target.fits(name)));
                    targets.iter().any(|target| target.is("Linear")) || by_name()
                };
                let (_, scheme) = schemes.iter().find(|(targets, _)| is_meant(targets))?;
                compressed_size(scheme, weight.shape, self.stored)
            }
            How::Fp8(block) => fp8_size(*block, weight.shape),
            How::Mxfp4 => {
                let elements = (rows * columns) as u64;
                (weight.place == Place::Expert).then_some((Format::Mxfp4, elements / 2 + elements / 32))
            }
        }
    }

    /// What was taken as usual, since config.json leaves it open.
    pub fn assumed(&self) -> &'static str {
        match &self.how {
            How::Mlx(_) => "all matrices are packed that it does not name and whose columns fill groups",
            How::Bitsandbytes(_) => "all linear layers are packed that it does not name, in blocks of 64",
            How::Gptq(..) | How::Awq(_) => "all linear layers of the decoder are packed that it does not name",
            How::Compressed(_) => "routers are not packed, and scales have the type of the other numbers",
            How::Fp8(_) => "routers and the output layer are not packed, and scales are f32",
            How::Mxfp4 => "experts alone are packed",
        }
    }

    fn is_plain(&self, weight: &Weight<'_>) -> bool {
        let is_named =
            |plain: &[Pattern]| weight.names.iter().any(|name| plain.iter().any(|pattern| pattern.fits(name)));
        match (&self.how, &self.plain) {
            (How::Gptq(gptq, _), _) if weight.place == Place::Output => !gptq.has_output,
            (How::Awq(_) | How::Fp8(_), _) if weight.place == Place::Output => true,
            // A list takes the place of the one that programs have themselves, which is the output layer.
            (How::Bitsandbytes(_), None) => weight.place == Place::Output,
            (_, plain) => plain.as_deref().is_some_and(is_named),
        }
    }

    fn gptq_size(&self, gptq: &Gptq, bits: usize, weight: &Weight<'_>) -> Option<(Format, u64)> {
        let is_meant = |modules: &[String]| {
            let ends = |name: &str, end: &str| name.strip_suffix(end).is_some_and(|layer| layer.ends_with('.'));
            weight.names.iter().any(|name| modules.iter().any(|module| ends(name, module)))
        };
        if !gptq.modules.as_deref().is_none_or(is_meant) {
            return None;
        }
        let [rows, columns] = weight.shape;
        let group = match gptq.group.unwrap_or(GROUP) {
            0 => columns,
            group => group,
        };
        let (codes, groups) = (4 * rows * (columns * bits / 32), rows * columns.div_ceil(group));
        let bytes = codes + groups * self.stored.dtype().size() + groups;
        Some((Format::Gptq { bits, group, act_order: gptq.act_order && group < columns }, bytes as u64))
    }

    fn awq_size(&self, group: Option<usize>, [rows, columns]: [usize; 2]) -> (Format, u64) {
        let group = group.unwrap_or(GROUP);
        let (codes, groups) = (rows * columns.div_ceil(2), rows * columns.div_ceil(group));
        (Format::Awq { group }, (codes + groups * self.stored.dtype().size() + groups) as u64)
    }
}

/// `None`: MLX has no such form.
fn mlx_size(form: &MlxForm, [rows, columns]: [usize; 2], stored: Stored) -> Option<(Format, u64)> {
    let &MlxForm { bits, group, ref mode } = form;
    let elements = (rows * columns) as u64;
    match (mode.as_str(), bits, group) {
        ("affine", 2 | 3 | 4 | 5 | 6 | 8, 32 | 64 | 128) => {
            let (codes, scales) = (rows * (columns * bits / 8), rows * (columns / group));
            Some((Format::Mlx { bits, group }, (codes + 2 * scales * stored.dtype().size()) as u64))
        }
        ("mxfp4", 4, 32) => Some((Format::Mxfp4, elements / 2 + elements / 32 + TABLE_OF_4_BITS)),
        ("nvfp4", 4, 16) => Some((Format::Nvfp4, elements / 2 + elements / 16 + TABLE_OF_4_BITS)),
        ("mxfp8", 8, 32) => Some((Format::Mxfp8, elements + elements / 32 + TABLE_OF_8_BITS)),
        _ => None,
    }
}

/// In memory the scales are f32, packed or not.
fn bitsandbytes_size(form: Bitsandbytes, shape: [usize; 2]) -> (Format, u64) {
    match form {
        Bitsandbytes::Int8 => (Format::Bitsandbytes8, quantize::memory(quantize::Scheme::Int8, shape, Stored::F32)),
        Bitsandbytes::Four { nf4, double } => {
            let format = Format::Bitsandbytes4 { nf4, double, block: 64 };
            (format, quantize::memory(quantize::Scheme::Nf4, shape, Stored::F32))
        }
    }
}

/// Scales are f32, one for the matrix or one a block.
fn fp8_size(block: Option<[usize; 2]>, [rows, columns]: [usize; 2]) -> Option<(Format, u64)> {
    let lengths = block.map_or(vec![], |[height, width]| vec![rows.div_ceil(height), columns.div_ceil(width)]);
    let scales = arranged(&lengths, [rows, columns], block)?;
    let count: usize = lengths.iter().product();
    Some((Format::Fp8 { scales }, (rows * columns + 4 * count) as u64 + TABLE_OF_8_BITS))
}

/// How compressed-tensors lays out the codes of a group.
#[derive(Clone, Copy)]
enum Packing {
    /// 4 or 8 bits in words.
    Words(usize),
    /// Whole numbers of a byte.
    Bytes,
    Float8,
    Mxfp4,
    Nvfp4,
    /// It does not pack.
    Plain,
}

impl Packing {
    /// `None`: its tensors are needed to tell, or it is not read.
    fn of(scheme: &Scheme) -> Option<Packing> {
        match (scheme.format.as_str(), scheme.is_float, scheme.bits?) {
            ("dense", ..) => Some(Packing::Plain),
            ("pack-quantized", false, bits @ (4 | 8)) => Some(Packing::Words(bits)),
            ("int-quantized" | "naive-quantized", false, 8) => Some(Packing::Bytes),
            ("float-quantized" | "naive-quantized", true, 8) => Some(Packing::Float8),
            ("mxfp4-pack-quantized", true, 4) => Some(Packing::Mxfp4),
            ("nvfp4-pack-quantized", true, 4) => Some(Packing::Nvfp4),
            _ => None,
        }
    }
}

fn compressed_size(scheme: &Scheme, [rows, columns]: [usize; 2], stored: Stored) -> Option<(Format, u64)> {
    let packing = Packing::of(scheme)?;
    let elements = (rows * columns) as u64;
    match packing {
        Packing::Plain => return None,
        Packing::Mxfp4 => return Some((Format::Mxfp4, elements / 2 + elements / 32 + TABLE_OF_4_BITS)),
        // Each scale is multiplied with that of the matrix, in f32.
        Packing::Nvfp4 => return Some((Format::Nvfp4, elements / 2 + 4 * (elements / 16) + TABLE_OF_4_BITS)),
        Packing::Words(_) | Packing::Bytes | Packing::Float8 => {}
    }
    let lengths = match (scheme.strategy.as_str(), scheme.group, scheme.block) {
        ("channel", ..) => vec![rows, 1],
        ("block", _, Some([height, width])) => vec![rows.div_ceil(height), columns.div_ceil(width)],
        ("group" | "", Some(group), _) => vec![rows, columns.div_ceil(group)],
        _ => vec![1],
    };
    let scales = arranged(&lengths, [rows, columns], scheme.block).unwrap_or(Scales::Matrix);
    let count = lengths.iter().product::<usize>();
    let zeros = if scheme.is_symmetric { 0 } else { count };
    let of_scales = (count * stored.dtype().size()) as u64;
    let act_order = scheme.act_order && matches!(scales, Scales::Groups(_));
    let whole = |bits| Format::Compressed { bits, scales, act_order };
    Some(match packing {
        Packing::Float8 => (Format::Fp8 { scales }, elements + of_scales + TABLE_OF_8_BITS),
        Packing::Words(bits) => {
            let codes = 4 * rows * (columns * bits).div_ceil(32);
            (whole(bits), (codes + zeros) as u64 + of_scales)
        }
        _ => (whole(8), elements + of_scales + zeros as u64),
    })
}

//! The names of formats.

use std::fmt;

/// Which elements share a scale, in a format that leaves it open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scales {
    /// One for the whole matrix.
    Matrix,
    /// One for each row.
    Rows,
    /// One for so many elements of a row.
    Groups(usize),
    /// One for each block of `rows x columns`.
    Blocks(usize, usize),
}

/// The format that a weight is in. `Display` has the words for the user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// MLX, mode `affine`.
    Mlx {
        /// Bits of a code.
        bits: usize,
        /// Elements of a row that share a scale and a bias.
        group: usize,
    },
    /// E2M1 codes, E8M0 scales for groups of 32: mode `mxfp4` of MLX, compressed-tensors, gpt-oss.
    Mxfp4,
    /// E4M3 codes, E8M0 scales for groups of 32.
    Mxfp8,
    /// E2M1 codes, E4M3 scales for groups of 16, and perhaps one of the whole matrix.
    Nvfp4,
    /// bitsandbytes NF4 or FP4.
    Bitsandbytes4 {
        /// Whether it is NF4.
        nf4: bool,
        /// Whether the scales are packed too.
        double: bool,
        /// Elements that share a scale.
        block: usize,
    },
    /// bitsandbytes int8.
    Bitsandbytes8,
    /// Whole numbers of compressed-tensors.
    Compressed {
        /// Bits of a code.
        bits: usize,
        /// Which elements share a scale.
        scales: Scales,
        /// Whether the columns of a group are told by `weight_g_idx`.
        act_order: bool,
    },
    /// E4M3 floats.
    Fp8 {
        /// Which elements share a scale.
        scales: Scales,
    },
    /// GPTQ.
    Gptq {
        /// Bits of a code.
        bits: usize,
        /// Columns that share a scale.
        group: usize,
        /// Whether the columns of a group are told by `g_idx`.
        act_order: bool,
    },
    /// AWQ, version `gemm`.
    Awq {
        /// Columns that share a scale.
        group: usize,
    },
}

impl fmt::Display for Scales {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Scales::Matrix => write!(formatter, "one scale"),
            Scales::Rows => write!(formatter, "a scale a row"),
            Scales::Groups(columns) => write!(formatter, "groups of {columns}"),
            Scales::Blocks(rows, columns) => write!(formatter, "blocks of {rows} x {columns}"),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let order = |act_order: bool| if act_order { ", act-order" } else { "" };
        match *self {
            Format::Mlx { bits, group } => write!(formatter, "MLX {bits}-bit, groups of {group}"),
            Format::Mxfp4 => write!(formatter, "MXFP4, groups of 32"),
            Format::Mxfp8 => write!(formatter, "MXFP8, groups of 32"),
            Format::Nvfp4 => write!(formatter, "NVFP4, groups of 16"),
            Format::Bitsandbytes4 { nf4, double, block } => {
                let kind = if nf4 { "NF4" } else { "FP4" };
                let double = if double { ", double quantization" } else { "" };
                let blocks = if block == 64 { String::new() } else { format!(", blocks of {block}") };
                write!(formatter, "bitsandbytes {kind}{blocks}{double}")
            }
            Format::Bitsandbytes8 => write!(formatter, "bitsandbytes int8"),
            Format::Compressed { bits, scales, act_order } => {
                write!(formatter, "compressed-tensors {bits}-bit, {scales}{}", order(act_order))
            }
            Format::Fp8 { scales } => write!(formatter, "FP8 E4M3, {scales}"),
            Format::Gptq { bits, group, act_order } => {
                write!(formatter, "GPTQ {bits}-bit, groups of {group}{}", order(act_order))
            }
            Format::Awq { group } => write!(formatter, "AWQ 4-bit, groups of {group}"),
        }
    }
}

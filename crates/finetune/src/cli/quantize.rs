//! Arguments of `finetune quantize`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use finetune_model::Scheme;
use finetune_recipe::Quantization;

/// The form that a 16-bit matrix is packed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum SchemeArgument {
    /// 4 bits, 64 columns share scale and bias, as mlx-lm does; embedding and output layer too
    Mlx4,
    /// The same in 8 bits
    Mlx8,
    /// 4-bit floats, 32 columns share a power of two, as mlx-lm writes them
    Mxfp4,
    /// 4 bits by the quantiles of a normal distribution, as bitsandbytes does; linear layers only
    Nf4,
    /// 8 bits with one scale a row, as bitsandbytes does; linear layers only
    Int8,
}

impl From<SchemeArgument> for Quantization {
    fn from(scheme: SchemeArgument) -> Quantization {
        match scheme {
            SchemeArgument::Mlx4 => Quantization::Mlx4,
            SchemeArgument::Mlx8 => Quantization::Mlx8,
            SchemeArgument::Mxfp4 => Quantization::Mxfp4,
            SchemeArgument::Nf4 => Quantization::Nf4,
            SchemeArgument::Int8 => Quantization::Int8,
        }
    }
}

impl From<SchemeArgument> for Scheme {
    fn from(scheme: SchemeArgument) -> Scheme {
        match scheme {
            SchemeArgument::Mlx4 => Scheme::Mlx4,
            SchemeArgument::Mlx8 => Scheme::Mlx8,
            SchemeArgument::Mxfp4 => Scheme::Mxfp4,
            SchemeArgument::Nf4 => Scheme::Nf4,
            SchemeArgument::Int8 => Scheme::Int8,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct QuantizeArguments {
    /// A model directory in 16 or 32 bits, or a hub id (OWNER/NAME), which is fetched if it is not in
    /// the Hugging Face cache
    #[arg(value_name = "MODEL_DIR")]
    pub(crate) model: PathBuf,
    /// The form to write
    #[arg(long, value_enum, value_name = "SCHEME")]
    pub(crate) to: SchemeArgument,
    /// Where to write it; the directory must not hold anything else
    #[arg(long, value_name = "DIR")]
    pub(crate) output: PathBuf,
    /// Print path, sizes and what stayed as it was as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

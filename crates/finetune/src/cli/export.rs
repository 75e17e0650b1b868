//! Arguments of `export`.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use super::quantize::SchemeArgument;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ExportFormat {
    /// A complete model directory with the adapter merged in, for transformers, vLLM and mlx-lm
    Merged,
    /// The adapter alone, in PEFT's format
    Peft,
    /// The adapter alone, in mlx-lm's format
    Mlx,
    /// A GGUF file with the adapter merged in, for llama.cpp and Ollama; with --adapter-only the
    /// adapter alone
    Gguf,
}

/// The number type of an export's weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ExportDtype {
    F32,
    Bf16,
    F16,
    /// Bytes, 32 of which share a scale (gguf)
    #[value(name = "q8_0")]
    Q8_0,
}

/// An adapter and its weight in the sum.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct WeightedAdapter {
    pub(crate) path: PathBuf,
    pub(crate) weight: f64,
}

impl WeightedAdapter {
    /// `DIR` or `DIR=WEIGHT`. A path that is there may have an `=` in its name.
    fn parse(text: &str) -> Result<WeightedAdapter, String> {
        let whole = WeightedAdapter { path: text.into(), weight: 1.0 };
        let Some((path, weight)) = text.rsplit_once('=').filter(|_| !Path::new(text).exists()) else {
            return Ok(whole);
        };
        match weight.parse::<f64>() {
            Ok(weight) if weight.is_finite() && !path.is_empty() => Ok(WeightedAdapter { path: path.into(), weight }),
            _ => Err(format!("after `=` belongs the adapter's weight, a number: {path}=0.5")),
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct ExportArguments {
    /// A run, a checkpoint or an adapter; or a model directory, with --adapter or for gguf
    #[arg(value_name = "RUN|MODEL_DIR")]
    pub(crate) source: PathBuf,
    /// The adapter for the model directory: a run, a checkpoint or an adapter, PEFT's or mlx-lm's.
    /// Several are added up, each times its weight (default 1)
    #[arg(long, value_name = "ADAPTER[=WEIGHT]", value_parser = WeightedAdapter::parse, conflicts_with_all = ["base", "best"])]
    pub(crate) adapter: Vec<WeightedAdapter>,
    /// What to write
    #[arg(long, value_enum)]
    pub(crate) format: ExportFormat,
    /// Where to write it; the directory must not hold anything else
    #[arg(long, value_name = "DIR")]
    pub(crate) output: PathBuf,
    /// Number type of the weights (merged, gguf); default: the base's, and f16 for gguf of an f32
    /// base. An adapter alone is in f32; gguf's may be in bf16 or f16
    #[arg(long, value_enum)]
    pub(crate) dtype: Option<ExportDtype>,
    /// Pack the merged weights again (merged). Without it they have 16 bits, also over a packed base: in
    /// 4 bits little of the training survives, and the export says how much
    #[arg(long, value_enum, value_name = "SCHEME")]
    pub(crate) quantize: Option<SchemeArgument>,
    /// Multiply what the adapter adds by this
    #[arg(long, value_name = "S", allow_negative_numbers = true)]
    pub(crate) scale: Option<f64>,
    /// Of gguf, write the adapter alone, for a base that is a GGUF file too
    #[arg(long)]
    pub(crate) adapter_only: bool,
    /// Of a run, take the checkpoint with the best evaluation instead of the newest one
    #[arg(long)]
    pub(crate) best: bool,
    /// The base model, if it is not where the run found it
    #[arg(long, value_name = "MODEL_DIR")]
    pub(crate) base: Option<PathBuf>,
    /// Use another base model than the adapter was trained on all the same
    #[arg(long)]
    pub(crate) force: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_with_weights() {
        let found = |text: &str| WeightedAdapter::parse(text).map(|found| (found.path, found.weight));
        let here = tempfile::tempdir().expect("a temporary directory");
        let odd = here.path().join("rank=8");
        std::fs::create_dir(&odd).expect("a new directory");
        let odd = odd.to_string_lossy().into_owned();
        assert_eq!(found("runs/a"), Ok(("runs/a".into(), 1.0)));
        assert_eq!(found("runs/a=0.5"), Ok(("runs/a".into(), 0.5)));
        assert_eq!(found("runs/a=-1"), Ok(("runs/a".into(), -1.0)));
        assert_eq!(found(&odd), Ok((odd.clone().into(), 1.0)));
        assert_eq!(found(&format!("{odd}=2")), Ok((odd.into(), 2.0)));
        for wrong in ["a=b", "a=", "a=inf", "=1"] {
            assert!(found(wrong).is_err(), "{wrong}");
        }
    }
}

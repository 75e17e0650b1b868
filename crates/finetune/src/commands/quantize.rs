//! `finetune quantize`: a model directory in a few bits a weight, for other programs and for runs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use finetune_model::merge::Merged;
use finetune_model::{Model, ModelConfig, Scheme, expected_tensors, quantize_model, scheme_word};
use finetune_store::{Dtype, Holding, RealDisk, Staging, StoreError, TensorSet, recognize, refuse_links_out};
use serde_json::json;

use crate::cli::QuantizeArguments;
use crate::commands::export::{refuse_place, say_left_out};
use crate::commands::preflight::free_bytes;
use crate::failure::Failure;
use crate::interrupt::Unfinished;
use crate::output;
use crate::progress::{Progress, Verbosity, bytes};
use crate::source::{Named, named};

/// What the manifest calls such a directory.
pub(super) const KIND: &str = "packed model";

/// What the names of experts have in the middle.
const EXPERTS: &str = ".experts.";

/// The most names that a line lists.
const SHOWN: usize = 4;

pub(crate) fn quantize(arguments: &QuantizeArguments, verbosity: Verbosity) -> Result<ExitCode, Failure> {
    let unfinished = Unfinished::watch()?;
    let mut show = Progress::new(if arguments.json { Verbosity::Quiet } else { verbosity }, 1);
    let result = write(arguments, &mut show, &unfinished);
    // A signal removes the directory and ends the program. An error that comes of it is not
    // reported: this waits for the end.
    let _held = unfinished.publishing();
    let report = result?;
    if arguments.json {
        output::line(&report.json(&arguments.output))?;
    } else {
        output::print(&report.text())?;
        show.say(&format!("written to  {}", arguments.output.display()));
    }
    Ok(ExitCode::SUCCESS)
}

fn write(arguments: &QuantizeArguments, show: &mut Progress, unfinished: &Unfinished) -> Result<Report, Failure> {
    let scheme = Scheme::from(arguments.to);
    let base = base(arguments, show)?;
    let output = &arguments.output;
    refuse_place(output, &[&base])?;
    refuse_links_out(&base)?;
    if let Some(words) = Model::form(&base, None)?.words {
        return Err(packed_already(&base, &words));
    }
    let config = ModelConfig::load(&base)?;
    let before = Sizes::of(&base)?;
    let about = before.packed(scheme);
    if let Some(free) = free_bytes(output).filter(|free| *free < about) {
        return Err(no_room(output, about, free));
    }
    show.say(&format!("model       {}", base.display()));
    let mut staging = unfinished.begin(|| Staging::begin_replacing(&RealDisk, output, KIND))?;
    show.start("packing", expected_tensors(&config).len() as u64);
    let written = quantize_model(&RealDisk, &base, scheme, &mut staging, &|done, _| show.position(done as u64));
    show.finish();
    let written = written?;
    let after = Sizes::of(staging.directory())?;
    let publishing = unfinished.publishing();
    staging.publish_replacing(&json!({"kind": KIND, "scheme": scheme_word(scheme)}))?;
    drop(publishing);
    say_left_out(&base, show);
    Ok(Report::new(scheme, &before, &after, written))
}

/// The model that is packed.
fn base(arguments: &QuantizeArguments, show: &Progress) -> Result<PathBuf, Failure> {
    let mut notices = Vec::new();
    let found = named(&arguments.model, &mut notices)?;
    notices.iter().for_each(|notice| show.say(notice));
    let given = arguments.model.display();
    match found {
        Named::Adapter(adapter) => Err(Failure::bad_input(
            format!("{given} is no model: {} is an adapter, which stays in f32", adapter.display()),
            vec![
                format!(
                    "`finetune export {given} --format merged --output DIR` makes a 16-bit model of base and adapter"
                ),
                "packed in 4 bits it keeps little of the training: a packed base with the adapter beside it keeps all"
                    .to_owned(),
            ],
        )),
        Named::Model(model) if recognize(&model) == Holding::Gguf => Err(Failure::arguments(
            format!(
                "{} is a GGUF file, and what is packed here is a Hugging Face directory in 16 bits",
                model.display()
            ),
            "llama.cpp's `llama-quantize` writes other forms of GGUF; a run takes the file as it is",
        )),
        Named::Model(model) => Ok(model),
    }
}

/// Packing a second time adds the errors of both.
fn packed_already(base: &Path, words: &str) -> Failure {
    let base = base.display();
    Failure::bad_input(
        format!("{base} is packed already: {words}"),
        vec![
            format!("use it as it is: model.path = \"{base}\", or `finetune chat {base}`"),
            "for another form, quantize the 16-bit model that it was made from".to_owned(),
        ],
    )
}

fn no_room(output: &Path, needed: u64, free: u64) -> Failure {
    Failure::no_space(
        format!("{} needs about {}, and {} are free there", output.display(), bytes(needed), bytes(free)),
        vec!["make room, or name a place on another disk with --output".to_owned()],
    )
}

/// What the weight files of a model hold.
struct Sizes {
    /// Bytes of all tensors.
    bytes: u64,
    /// Type and shape of all tensors, in the order of the names.
    tensors: BTreeMap<String, (Dtype, Vec<usize>)>,
}

impl Sizes {
    fn of(model: &Path) -> Result<Sizes, StoreError> {
        let files = TensorSet::open_model(model)?;
        let views = || files.names().filter_map(|name| files.get(name));
        Ok(Sizes {
            bytes: views().map(|view| view.size() as u64).sum(),
            tensors: views().map(|view| (view.name.to_owned(), (view.dtype, view.shape.to_vec()))).collect(),
        })
    }

    fn elements(shape: &[usize]) -> u64 {
        shape.iter().map(|&length| length as u64).product()
    }

    /// About the bytes that this takes once it is packed, if all matrices are that may be.
    fn packed(&self, scheme: Scheme) -> u64 {
        let bits = bits(scheme);
        let tensor = |(name, (dtype, shape)): (&String, &(Dtype, Vec<usize>))| {
            let elements = Sizes::elements(shape);
            // A stack of experts has three dimensions.
            let is_packed = match (name.contains(EXPERTS), group(scheme)) {
                (true, Some(_)) => shape.len() >= 2,
                (true, None) => false,
                (false, _) => shape.len() == 2,
            };
            if is_packed { (elements as f64 * bits / 8.0) as u64 } else { elements * dtype.size() as u64 }
        };
        self.tensors.iter().map(tensor).sum()
    }
}

/// Bits of an element with its part of scale and bias.
fn bits(scheme: Scheme) -> f64 {
    match scheme {
        Scheme::Mlx4 | Scheme::Nf4 => 4.5,
        Scheme::Mlx8 => 8.5,
        Scheme::Mxfp4 => 4.25,
        // Scales of rows are few.
        Scheme::Int8 => 8.1,
    }
}

/// Columns that share a scale. `None`: any number does.
fn group(scheme: Scheme) -> Option<usize> {
    match scheme {
        Scheme::Mlx4 | Scheme::Mlx8 => Some(64),
        Scheme::Mxfp4 => Some(32),
        Scheme::Nf4 | Scheme::Int8 => None,
    }
}

/// What loads a directory.
fn reader(scheme: Scheme) -> &'static str {
    match scheme {
        Scheme::Mlx4 | Scheme::Mlx8 | Scheme::Mxfp4 => "mlx-lm",
        Scheme::Nf4 | Scheme::Int8 => "transformers with bitsandbytes",
    }
}

/// What came of it.
#[derive(Debug)]
struct Report {
    scheme: Scheme,
    before: u64,
    after: u64,
    /// Of all weights.
    bits_per_weight: f64,
    matrices: usize,
    /// Matrices that stayed as they were, and why.
    kept: Vec<(String, String)>,
    /// Parts of a multimodal model that are not in the result.
    left_out: Vec<String>,
}

impl Report {
    fn new(scheme: Scheme, before: &Sizes, after: &Sizes, written: Merged) -> Report {
        let Merged { left_out, matrices, plain, .. } = written;
        let is_there = |name: &String| {
            !left_out.iter().any(|part| name.strip_prefix(part.as_str()).is_some_and(|rest| rest.starts_with('.')))
        };
        let tensors = before.tensors.iter().filter(|(name, _)| is_there(name));
        let weights: u64 = tensors.map(|(_, (_, shape))| Sizes::elements(shape)).sum();
        let kept = plain.into_iter().map(|(name, columns)| {
            let why = why(scheme, &name, columns);
            (name, why)
        });
        Report {
            scheme,
            before: before.bytes,
            after: after.bytes,
            bits_per_weight: after.bytes as f64 * 8.0 / weights.max(1) as f64,
            matrices,
            kept: kept.collect(),
            left_out,
        }
    }

    fn text(&self) -> String {
        let Report { scheme, before, after, bits_per_weight, matrices, kept, left_out } = self;
        let mut text = format!(
            "{} of {matrices} matrices in {}: {} instead of {}, {bits_per_weight:.2} bits a weight\n",
            matrices - kept.len(),
            scheme_word(*scheme),
            bytes(*after),
            bytes(*before),
        );
        for (why, names) in self.reasons() {
            let more = if names.len() > SHOWN { format!(" and {} more", names.len() - SHOWN) } else { String::new() };
            text += &format!("as they were: {}{more}: {why}\n", names[..names.len().min(SHOWN)].join(", "));
        }
        if !left_out.is_empty() {
            text += &format!("left out    {}: {} has the text model alone\n", left_out.join(", "), reader(*scheme));
        }
        text += &format!("loads in    {}, and here: model.path, eval, generate, chat\n", reader(*scheme));
        text
    }

    /// The names of the matrices that stayed, by the reason. Those of many layers are one name.
    fn reasons(&self) -> BTreeMap<&str, Vec<String>> {
        let mut reasons: BTreeMap<&str, BTreeMap<String, BTreeSet<&str>>> = BTreeMap::new();
        for (name, why) in &self.kept {
            let (layer, part) = part(name);
            reasons.entry(why).or_default().entry(part).or_default().insert(layer);
        }
        let named = |(name, layers): (String, BTreeSet<&str>)| match layers.len() {
            1 => name,
            count => format!("{name} of {count} layers"),
        };
        reasons.into_iter().map(|(why, names)| (why, names.into_iter().map(named).collect())).collect()
    }

    fn json(&self, output: &Path) -> String {
        let kept: Vec<_> = self.kept.iter().map(|(name, why)| json!({"name": name, "why": why})).collect();
        let Report { scheme, before, after, bits_per_weight, matrices, left_out, .. } = self;
        json!({
            "path": output, "scheme": scheme_word(*scheme), "bytes_before": before, "bytes": after,
            "bits_per_weight": bits_per_weight, "matrices": matrices, "kept": kept, "left_out": left_out,
            "loads_in": reader(*scheme),
        })
        .to_string()
    }
}

/// The layer of a matrix, and its module there: `7` and `mlp.down_proj` of
/// `model.layers.7.mlp.down_proj.weight`. All experts of a layer have one name.
fn part(name: &str) -> (&str, String) {
    let module = name.trim_end_matches(".weight");
    let in_layer = module.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
    let (layer, part) = in_layer.unwrap_or(("", module));
    let of_expert = format!(".{part}");
    match of_expert.split_once(EXPERTS).and_then(|(before, rest)| Some((before, rest.split_once('.')?.1))) {
        Some((before, projection)) => (layer, format!("{before}{EXPERTS}*.{projection}")[1..].to_owned()),
        None => (layer, part.to_owned()),
    }
}

/// Why a matrix stayed as it was.
fn why(scheme: Scheme, name: &str, columns: usize) -> String {
    let of_vocabulary = name.contains("embed_tokens") || name.starts_with("lm_head");
    match group(scheme) {
        None if of_vocabulary => "bitsandbytes packs the linear layers between embedding and output layer".to_owned(),
        None if name.contains(EXPERTS) => {
            "transformers has experts in stacks, which bitsandbytes does not pack".to_owned()
        }
        Some(_) if name.ends_with(".kv_b_proj.weight") => "mlx-lm makes two matrices of it for each head".to_owned(),
        Some(group) if !columns.is_multiple_of(group) => format!("its {columns} columns are no multiple of {group}"),
        _ => format!("it is none of the matrices that {} packs", reader(scheme)),
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    fn sizes(tensors: &[(&str, Dtype, &[usize])]) -> Sizes {
        let bytes = tensors.iter().map(|(_, dtype, shape)| Sizes::elements(shape) * dtype.size() as u64).sum();
        let tensors = tensors.iter().map(|(name, dtype, shape)| ((*name).to_owned(), (*dtype, shape.to_vec())));
        Sizes { bytes, tensors: tensors.collect() }
    }

    /// `matrices` in all, of which these are in plain numbers: names and columns.
    fn written(matrices: usize, plain: &[(&str, usize)]) -> Merged {
        let plain = plain.iter().map(|(name, columns)| ((*name).to_owned(), *columns)).collect();
        Merged { matrices, plain, ..Merged::default() }
    }

    const DOWN: [(&str, usize); 2] =
        [("model.layers.0.mlp.down_proj.weight", 176), ("model.layers.1.mlp.down_proj.weight", 176)];

    #[test]
    fn what_is_said_of_a_packed_model() {
        let before = sizes(&[
            ("model.embed_tokens.weight", Dtype::BF16, &[1024, 64]),
            ("model.layers.0.mlp.down_proj.weight", Dtype::BF16, &[64, 176]),
            ("model.layers.1.mlp.down_proj.weight", Dtype::BF16, &[64, 176]),
            ("model.layers.0.mlp.up_proj.weight", Dtype::BF16, &[176, 64]),
            ("model.norm.weight", Dtype::BF16, &[64]),
        ]);
        assert_eq!(before.packed(Scheme::Mlx4), (1024 * 64 + 3 * 176 * 64) * 9 / 16 + 128);
        let after = sizes(&[
            ("model.embed_tokens.biases", Dtype::BF16, &[1024, 1]),
            ("model.embed_tokens.scales", Dtype::BF16, &[1024, 1]),
            ("model.embed_tokens.weight", Dtype::U32, &[1024, 8]),
            ("model.layers.0.mlp.down_proj.weight", Dtype::BF16, &[64, 176]),
            ("model.layers.1.mlp.down_proj.weight", Dtype::BF16, &[64, 176]),
            ("model.layers.0.mlp.up_proj.biases", Dtype::BF16, &[176, 1]),
            ("model.layers.0.mlp.up_proj.scales", Dtype::BF16, &[176, 1]),
            ("model.layers.0.mlp.up_proj.weight", Dtype::U32, &[176, 8]),
            ("model.norm.weight", Dtype::BF16, &[64]),
        ]);
        expect![[r#"
            2 of 4 matrices in mlx4: 86.3 KiB instead of 194.1 KiB, 7.11 bits a weight
            as they were: mlp.down_proj of 2 layers: its 176 columns are no multiple of 64
            loads in    mlx-lm, and here: model.path, eval, generate, chat
        "#]]
        .assert_eq(&Report::new(Scheme::Mlx4, &before, &after, written(4, &DOWN)).text());
        let after = sizes(&[
            ("model.embed_tokens.weight", Dtype::BF16, &[1024, 64]),
            ("model.layers.0.mlp.down_proj.SCB", Dtype::F32, &[64]),
            ("model.layers.0.mlp.down_proj.weight", Dtype::I8, &[64, 176]),
            ("model.layers.1.mlp.down_proj.SCB", Dtype::F32, &[64]),
            ("model.layers.1.mlp.down_proj.weight", Dtype::I8, &[64, 176]),
            ("model.layers.0.mlp.up_proj.SCB", Dtype::F32, &[176]),
            ("model.layers.0.mlp.up_proj.weight", Dtype::I8, &[176, 64]),
            ("model.norm.weight", Dtype::BF16, &[64]),
        ]);
        let plain = [("model.embed_tokens.weight", 64)];
        let report = Report::new(Scheme::Int8, &before, &after, written(4, &plain));
        assert_eq!(report.kept.len(), 1);
        assert!(report.text().contains("bitsandbytes packs the linear layers between"), "{}", report.text());
    }

    #[test]
    fn what_is_said_of_parts_that_are_left_out() {
        let before = sizes(&[
            ("model.language_model.embed_tokens.weight", Dtype::BF16, &[64, 64]),
            ("model.visual.blocks.0.attn.qkv.weight", Dtype::BF16, &[64, 64]),
            ("model.visually.weight", Dtype::BF16, &[64, 64]),
        ]);
        let after = sizes(&[("language_model.model.embed_tokens.weight", Dtype::U32, &[64, 8])]);
        let written = Merged { left_out: vec!["model.visual".to_owned()], ..written(1, &[]) };
        let text = Report::new(Scheme::Mlx4, &before, &after, written).text();
        // 2048 bytes of two tensors of 4096 elements.
        assert!(text.contains(" 2.00 bits a weight"), "{text}");
        assert!(text.contains("left out    model.visual: mlx-lm has the text model alone\n"), "{text}");
    }

    #[test]
    fn what_is_said_of_experts() {
        let sizes = sizes(&[
            ("model.layers.1.mlp.experts.0.down_proj.weight", Dtype::BF16, &[64, 32]),
            ("model.layers.1.mlp.experts.down_proj", Dtype::BF16, &[4, 64, 32]),
        ]);
        assert_eq!(sizes.packed(Scheme::Mlx4), 5 * 64 * 32 * 9 / 16);
        assert_eq!(sizes.packed(Scheme::Nf4), 5 * 64 * 32 * 2);
        let plain = [
            ("model.layers.1.mlp.experts.0.down_proj.weight", 32),
            ("model.layers.1.mlp.experts.1.down_proj.weight", 32),
            ("model.layers.2.mlp.experts.0.down_proj.weight", 32),
            ("model.layers.1.experts.0.up_proj.weight", 64),
            ("model.layers.1.mlp.gate.weight", 64),
        ];
        let said = |scheme| {
            let report = Report::new(scheme, &sizes, &sizes, written(9, &plain));
            let reasons = report.reasons().into_iter().map(|(why, names)| format!("{}: {why}\n", names.join(", ")));
            reasons.collect::<String>()
        };
        expect![[r#"
            mlp.gate: it is none of the matrices that transformers with bitsandbytes packs
            experts.*.up_proj, mlp.experts.*.down_proj of 2 layers: transformers has experts in stacks, which bitsandbytes does not pack
        "#]]
        .assert_eq(&said(Scheme::Nf4));
        expect![[r#"
            experts.*.up_proj, mlp.gate: it is none of the matrices that mlx-lm packs
            mlp.experts.*.down_proj of 2 layers: its 32 columns are no multiple of 64
        "#]]
        .assert_eq(&said(Scheme::Mlx4));
    }
}

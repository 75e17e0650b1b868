//! The tensors of an adapter's file whose experts have one branch for all of a layer (gpt-oss).
//!
//! What is trained has a branch for each expert. In the file their A lie one below the other, [e · r, i], and
//! their B side by side, [o, r · e] by rank: as PEFT has the branch of a parameter.

use std::collections::{BTreeMap, BTreeSet};

use crate::adaptation::{is_expert, stack_of};
use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::flat_file::{FlatFile, FlatTensor};
use crate::layout::{Layout, Parameter};

/// A parameter of an expert's branch: that of the stack, such as `base_model.model.model.layers.0.mlp.experts`
/// and `down_proj`, and the half.
fn place(name: &str) -> Option<(String, String, &str)> {
    let (module, half) = name.strip_suffix(".weight")?.rsplit_once('.').filter(|_| is_expert(name))?;
    let stack = stack_of(module);
    let (experts, part) = stack.rsplit_once('.').filter(|_| stack != module)?;
    Some((experts.to_owned(), part.to_owned(), half))
}

/// The file of these trained parameters. `None`: it has them as they are.
///
/// # Errors
/// [`ModelError::NotExpressible`] if the experts of a layer have branches of several shapes, or only some of
/// them have one.
pub(super) fn stacked(name: &str, layout: &Layout, config: &ModelConfig) -> Result<Option<FlatFile>, ModelError> {
    let Some(experts) = config.experts.as_ref().filter(|_| config.family.has_expert_parameters()) else {
        return Ok(None);
    };
    // PEFT wraps the module once for each of its parameters, `down_proj` last.
    let wrapped_twice: BTreeSet<String> =
        layout.iter().filter_map(|p| place(&p.name)).filter(|p| p.1 == "down_proj").map(|p| p.0).collect();
    let mut tensors: Vec<FlatTensor> = Vec::new();
    let mut stacks: BTreeMap<String, usize> = BTreeMap::new();
    for Parameter { name, shape, range } in layout.iter() {
        let Some((module, part, half)) = place(name) else {
            let (name, shape, parts) = (name.clone(), shape.clone(), vec![range.clone()]);
            tensors.push(FlatTensor { name, shape, parts, take_turns: false, frozen: None });
            continue;
        };
        let inner = if part != "down_proj" && wrapped_twice.contains(&module) { ".base_layer" } else { "" };
        let stack = format!("{module}{inner}.{half}.weight");
        let ([rows, columns], take_turns) = ([shape[0], shape[1]], half == "lora_B");
        let number = *stacks.entry(stack.clone()).or_insert_with(|| {
            let shape = match take_turns {
                true => vec![rows, columns * experts.count],
                false => vec![experts.count * rows, columns],
            };
            tensors.push(FlatTensor { name: stack, shape, parts: Vec::new(), take_turns, frozen: None });
            tensors.len() - 1
        });
        tensors[number].parts.push(range.clone());
    }
    let is_whole = |number: &usize| {
        let FlatTensor { shape, parts, .. } = &tensors[*number];
        let each = shape.iter().product::<usize>() / experts.count;
        parts.len() == experts.count && parts.iter().all(|part| part.len() == each)
    };
    match stacks.iter().find(|(_, number)| !is_whole(number)) {
        None => Ok(Some(FlatFile { name: name.to_owned(), tensors })),
        Some((name, _)) => Err(ModelError::NotExpressible {
            what: format!("PEFT has one branch for all experts: those of `{name}` differ"),
            hint: "--format merged writes the model with them".to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;
    use std::path::Path;

    use finetune_store::{Dtype, RealDisk, TensorFile, encode_tensors, replace_file};

    use super::*;
    use crate::files::floats::to_f32;

    /// Two experts of a model of two, rank 2, two inputs and three outputs. (expert, half, elements)
    #[test]
    fn values_are_put_together_and_taken_apart() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models/gpt_oss_experts");
        let mut config = ModelConfig::load(&directory).expect("a config");
        config.experts.as_mut().expect("experts").count = 2;
        let mut layout = Layout::default();
        let module = "base_model.model.model.layers.0.mlp.experts";
        layout.push("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight".to_owned(), vec![1, 2]);
        for expert in 0..2 {
            for part in ["gate_up_proj", "down_proj"] {
                layout.push(format!("{module}.{expert}.{part}.lora_A.weight"), vec![2, 2]);
                layout.push(format!("{module}.{expert}.{part}.lora_B.weight"), vec![3, 2]);
            }
        }
        let file = stacked("adapter.safetensors", &layout, &config).expect("whole stacks").expect("stacks");
        let found: Vec<_> = file.specs().into_iter().map(|spec| (spec.name, spec.shape)).collect();
        let want = [
            ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight".to_owned(), vec![1, 2]),
            (format!("{module}.base_layer.lora_A.weight"), vec![4, 2]),
            (format!("{module}.base_layer.lora_B.weight"), vec![3, 4]),
            (format!("{module}.lora_A.weight"), vec![4, 2]),
            (format!("{module}.lora_B.weight"), vec![3, 4]),
        ];
        assert_eq!(found, want);
        // Of expert 0 the elements 2 to 21, of expert 1 those from 22 on.
        let values: Vec<f32> = (0..42).map(|n| n as f32).collect();
        let folder = tempfile::tempdir().expect("a directory");
        let tensors: Vec<_> = (0..)
            .zip(&file.tensors)
            .map(|(n, FlatTensor { name, shape, parts, .. })| {
                let parts: Vec<Vec<f32>> = parts.iter().map(|part| values[part.clone()].to_vec()).collect();
                (name.clone(), Dtype::F32, shape.clone(), Cow::Owned(file.bytes(n, &parts)))
            })
            .collect();
        let bytes = encode_tensors(&tensors, &FlatFile::metadata()).expect("a file");
        replace_file(&RealDisk, &folder.path().join(&file.name), &bytes).expect("written");
        let whole = TensorFile::open(&folder.path().join(&file.name)).expect("a file");
        let in_file = |name: &str| to_f32(&whole.get(name).expect("a tensor")).expect("values");
        assert_eq!(in_file(&want[0].0), [0.0, 1.0]);
        assert_eq!(in_file(&want[1].0), [2.0, 3.0, 4.0, 5.0, 22.0, 23.0, 24.0, 25.0]);
        assert_eq!(in_file(&want[2].0)[..6], [6.0, 26.0, 7.0, 27.0, 8.0, 28.0]);
        let reader = file.open(folder.path()).expect("the file");
        for (n, tensor) in file.tensors.iter().enumerate() {
            let want: Vec<f32> = tensor.parts.iter().flat_map(|part| values[part.clone()].to_vec()).collect();
            assert_eq!(reader.values(n).expect("values"), want, "{}", tensor.name);
        }
        config.experts.as_mut().expect("experts").count = 3;
        let error =
            stacked("adapter.safetensors", &layout, &config).expect_err("an expert without a branch").to_string();
        assert!(error.contains("one branch for all experts"), "{error}");
    }
}

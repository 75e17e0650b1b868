//! `finetune devices`: what there is to train on.

use std::process::ExitCode;

use finetune_model::{DeviceKind, FoundDevice, HAS_GPU_BACKEND, gpus, processor};

use crate::cli::DevicesArguments;
use crate::failure::Failure;
use crate::progress::bytes;
use crate::{memory, output};

pub(crate) fn devices(arguments: &DevicesArguments) -> Result<ExitCode, Failure> {
    let mut found = gpus(true);
    found.push(FoundDevice { memory: memory::machine_bytes(), ..FoundDevice::cpu() });
    if arguments.json {
        for device in &found {
            output::line(&json(device))?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let mut text = format!("{:<30} {:<10} {:<9} {:>9}  types\n", "name", "kind", "through", "memory");
    for device in &found {
        let memory = device.memory.map_or("?".to_owned(), bytes);
        let (name, kind, api) = (shortened(&device.name, 30), short_kind(device.kind), device.api);
        text += &format!("{name:<30} {kind:<10} {api:<9} {memory:>9}  {}\n", types(device).join(" "));
    }
    text += &format!(
        "\n{}\n",
        of_processor(&processor::instruction_sets(), processor::f32_kernel(), processor::bf16_kernel())
    );
    output::print(&text)?;
    if !HAS_GPU_BACKEND {
        crate::stderr::complain!(
            "this program was built without a GPU backend: `cargo build --release --features gpu` (Vulkan)"
        );
    } else if found.iter().all(|device| matches!(device.kind, DeviceKind::Cpu | DeviceKind::SoftwareGpu)) {
        crate::stderr::complain!(
            "no GPU was found: on Linux the Vulkan loader (libvulkan1) and the card's driver have to be installed"
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// What the products on the CPU are computed with.
fn of_processor(sets: &[&str], f32_kernel: &str, bf16_kernel: Option<&str>) -> String {
    let found = if sets.is_empty() { "no instruction sets that make a difference".to_owned() } else { sets.join(", ") };
    let bf16 = match bf16_kernel {
        Some(kernel) => format!("bf16 by {kernel} (with model.dtype = \"bf16\")"),
        None if sets.iter().any(|set| set.contains("BF16")) => "none in bf16, which is no faster here".to_owned(),
        None => "none in bf16".to_owned(),
    };
    format!("CPU: {found}; products: f32 by {f32_kernel}, {bf16}")
}

/// For a table that fits a terminal of 80 columns.
fn short_kind(kind: DeviceKind) -> &'static str {
    match kind {
        DeviceKind::Cpu => "CPU",
        DeviceKind::DiscreteGpu => "GPU",
        DeviceKind::IntegratedGpu => "shared GPU",
        DeviceKind::SoftwareGpu => "software",
    }
}

fn shortened(name: &str, width: usize) -> String {
    match name.char_indices().nth(width) {
        None => name.to_owned(),
        Some(_) => name.chars().take(width - 1).chain(['…']).collect(),
    }
}

fn types(device: &FoundDevice) -> Vec<&'static str> {
    device.types.iter().map(|kind| kind.name()).collect()
}

fn json(device: &FoundDevice) -> String {
    let kind = match device.kind {
        DeviceKind::Cpu => "cpu",
        DeviceKind::DiscreteGpu => "gpu",
        DeviceKind::IntegratedGpu => "integrated_gpu",
        DeviceKind::SoftwareGpu => "software_gpu",
    };
    let FoundDevice { name, api, memory, .. } = device;
    let mut object =
        serde_json::json!({"name": name, "kind": kind, "api": api, "memory_bytes": memory, "types": types(device)});
    if device.kind == DeviceKind::Cpu {
        object["instruction_sets"] = processor::instruction_sets().into();
        object["products"] = serde_json::json!({"f32": processor::f32_kernel(), "bf16": processor::bf16_kernel()});
    }
    object.to_string()
}

#[cfg(test)]
mod tests {
    use super::of_processor;

    #[test]
    fn instructions_and_who_uses_them() {
        for (sets, f32_kernel, bf16_kernel, want) in [
            (
                &["AVX2", "FMA", "AVX-512", "AVX512-BF16"][..],
                "AVX-512",
                Some("AVX512-BF16"),
                "CPU: AVX2, FMA, AVX-512, AVX512-BF16; products: f32 by AVX-512, bf16 by AVX512-BF16 (with model.dtype = \"bf16\")",
            ),
            (
                &["AVX-512", "AVX512-BF16"],
                "AVX-512",
                None,
                "CPU: AVX-512, AVX512-BF16; products: f32 by AVX-512, none in bf16, which is no faster here",
            ),
            (&["NEON"], "NEON", None, "CPU: NEON; products: f32 by NEON, none in bf16"),
        ] {
            assert_eq!(of_processor(sets, f32_kernel, bf16_kernel), want);
        }
    }
}

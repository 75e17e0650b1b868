//! The GPUs that the runtimes report.

use burn::tensor::Device;
use burn_cubecl::CubeDevice;
use burn_cubecl::cubecl::features::TypeUsage;

use super::tensor::element;
use crate::found_device::{DeviceKind, FloatType, FoundDevice};

/// See [`crate::devices::gpus`].
pub(crate) fn gpus(software: bool) -> Vec<FoundDevice> {
    let mut found: Vec<(FoundDevice, Option<_>)> = Vec::new();
    for device in CubeDevice::enumerate_all() {
        let kind = kind_of(&device);
        if kind == DeviceKind::SoftwareGpu && !software {
            // Opening a software renderer takes a hundred megabytes.
            continue;
        }
        let client = device.client();
        let properties = client.properties();
        let api = api_of(&device, client.name());
        if kind == DeviceKind::SoftwareGpu && api == "Vulkan" {
            // Mesa's lavapipe (22.3, 25.0) crashes while it compiles SPIR-V kernels. With WGSL it
            // works.
            continue;
        }
        let card = properties.identity.physical.clone();
        if found.iter().any(|(_, other)| matches!((&card, other), (Some(a), Some(b)) if is_same(a, b))) {
            continue;
        }
        let report = FoundDevice {
            kind,
            name: properties.identity.name.clone(),
            api,
            memory: properties.memory.max_memory(),
            types: types_of(&client),
            device: Device::new(device),
        };
        found.push((report, card));
    }
    let mut gpus: Vec<FoundDevice> = found.into_iter().map(|(report, _)| report).collect();
    let order =
        |kind| [DeviceKind::DiscreteGpu, DeviceKind::IntegratedGpu].iter().position(|&k| k == kind).unwrap_or(2);
    gpus.sort_by_key(|gpu| order(gpu.kind));
    gpus
}

fn is_same(a: &burn_cubecl::cubecl::ir::PhysicalDevice, b: &burn_cubecl::cubecl::ir::PhysicalDevice) -> bool {
    a.is_same_card(b)
}

fn kind_of(device: &CubeDevice) -> DeviceKind {
    let text = format!("{device:?}");
    if text.contains("Integrated") || cfg!(target_os = "macos") {
        DeviceKind::IntegratedGpu
    } else if text.contains("Cpu") {
        DeviceKind::SoftwareGpu
    } else {
        DeviceKind::DiscreteGpu
    }
}

fn api_of(device: &CubeDevice, compiler: &str) -> &'static str {
    let text = format!("{device:?} {compiler}").to_lowercase();
    match () {
        () if text.contains("msl") || cfg!(target_os = "macos") => "Metal",
        () if text.contains("spirv") => "Vulkan",
        () => "Vulkan (WGSL)",
    }
}

/// The number types of a device. A type counts if tensors can hold it, and if there is arithmetic
/// for it or matrix units take it.
fn types_of(client: &burn_cubecl::cubecl::client::Client) -> Vec<FloatType> {
    let properties = client.properties();
    let usable = |kind: FloatType| {
        let element = element(kind.dtype());
        let usage = properties.type_usage(element);
        let multiplies = properties.features.matmul.cmma.iter().any(|unit| unit.a_type == element);
        usage.is_superset(TypeUsage::Buffer | TypeUsage::Conversion)
            && (usage.contains(TypeUsage::Arithmetic) || multiplies)
    };
    [FloatType::F32, FloatType::F16, FloatType::BF16]
        .into_iter()
        .filter(|&kind| kind == FloatType::F32 || usable(kind))
        .collect()
}

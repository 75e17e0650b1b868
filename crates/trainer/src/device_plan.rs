//! The device and number types of a run: what the recipe asks for, on the devices that there are.

use std::path::PathBuf;

use finetune_allreduce::DeviceMatrix;
use finetune_model::processor::bf16_kernel;
use finetune_model::{DeviceKind, Family, FloatType, FoundDevice, HAS_GPU_BACKEND, Placement, gpus, scheme_named};
use finetune_recipe::{DeviceChoice, DtypeChoice, Model, Recipe};

use crate::error::{NotFetched, TrainError};
use crate::numbers::counted;

/// This host, this rank's part of it, and the recipe's file: what a run has to know of its
/// surroundings.
#[derive(Clone, Debug, Default)]
pub struct ThisHost {
    /// Bytes of main memory that this process may use, if they can be told.
    pub memory: Option<u64>,
    /// This rank's number among those of the host. It chooses the GPU.
    pub local_rank: usize,
    /// The number of ranks on the host.
    pub local_world: usize,
    /// A text that all processes of this machine share, and no other machine has. `None`: it is not known.
    pub machine: Option<String>,
    /// Which ranks are cabled to which, if a hostfile or a launcher says it.
    pub cables: Option<DeviceMatrix>,
    /// Bytes free where the run is written, if they can be told.
    pub disk: Option<u64>,
    /// The file that the recipe was read from. The run is never written over it.
    pub recipe_file: Option<PathBuf>,
    /// Says how much memory this process has had at most, in bytes.
    pub peak_memory: Option<fn() -> u64>,
    /// The commit that the program was built from, if it is known.
    pub commit: Option<&'static str>,
    /// Fetches files of the recipe's base by their names, into its directory. `None`: they are all here. All ranks
    /// of a run have it, or none has.
    pub fetch: Option<Fetch>,
}

/// Fetches files of the recipe's base by their names.
pub type Fetch = fn(&Recipe, &[String]) -> Result<(), NotFetched>;

/// The device and number types of a run.
#[derive(Clone, Debug)]
pub struct DevicePlan {
    /// Where the model is loaded to, and in which number types.
    pub placement: Placement,
    /// The device as it was found.
    pub found: FoundDevice,
    /// What a user should know about the choice.
    pub notices: Vec<String>,
}

impl DevicePlan {
    /// Chooses the device and number type of a recipe, for a model whose file has `stored` numbers.
    /// `auto` takes a GPU if there is a real one, and computes in the file's number type, but not in f16
    /// where the family's activations exceed that. The placement packs frozen matrices as
    /// `model.quantization` says.
    ///
    /// # Errors
    /// If the recipe asks for a GPU and there is none, or for f16 with a family that exceeds it.
    pub fn choose(
        model: &Model,
        host: &ThisHost,
        stored: FloatType,
        family: &Family,
    ) -> Result<DevicePlan, TrainError> {
        if model.dtype == DtypeChoice::F16 && family.exceeds_f16 {
            return Err(TrainError::ExceedsF16 { architecture: family.architecture });
        }
        let is_too_narrow = stored == FloatType::F16 && family.exceeds_f16;
        let stored = if is_too_narrow { FloatType::F32 } else { stored };
        let mut plan = match model.device {
            DeviceChoice::Cpu => DevicePlan::cpu(model.dtype),
            DeviceChoice::Gpu => DevicePlan::gpu(model.dtype, host, stored, gpus(true))?,
            DeviceChoice::Auto => {
                let real = gpus(false);
                if real.is_empty() {
                    DevicePlan::cpu(model.dtype)
                } else {
                    DevicePlan::gpu(model.dtype, host, stored, real)?
                }
            }
        };
        if is_too_narrow && model.dtype == DtypeChoice::Auto && !plan.placement.is_cpu() {
            let what = format!("the activations of {} exceed f16, which its file has", family.architecture);
            plan.notices.push(format!("{what}; f32 is used, and model.dtype = \"bf16\" takes half of its memory"));
        }
        let quantization = model.quantization.and_then(|quantization| scheme_named(quantization.as_str()));
        let placement = plan.placement.quantized(quantization).with_host_memory(host.memory);
        Ok(DevicePlan { placement, ..plan })
    }

    fn cpu(dtype: DtypeChoice) -> DevicePlan {
        if let (DtypeChoice::Bf16, Some(instructions)) = (dtype, bf16_kernel()) {
            let notice = format!("model.dtype = bf16: products with the frozen base are in bf16 ({instructions})");
            return DevicePlan {
                placement: Placement::cpu_with_bf16_products(),
                found: FoundDevice::cpu(),
                notices: vec![notice],
            };
        }
        let held = match dtype {
            DtypeChoice::Auto => None,
            DtypeChoice::F32 => Some(FloatType::F32),
            DtypeChoice::F16 => Some(FloatType::F16),
            DtypeChoice::Bf16 => Some(FloatType::BF16),
        };
        let narrow = held.filter(|&held| held != FloatType::F32);
        let notices = narrow.map(|held| {
            format!("model.dtype = {}: the frozen base is held in it, the CPU computes in f32", held.name())
        });
        DevicePlan {
            placement: Placement::cpu(held),
            found: FoundDevice::cpu(),
            notices: notices.into_iter().collect(),
        }
    }

    fn gpu(
        dtype: DtypeChoice,
        host: &ThisHost,
        stored: FloatType,
        gpus: Vec<FoundDevice>,
    ) -> Result<DevicePlan, TrainError> {
        let real = gpus.iter().filter(|gpu| gpu.kind != DeviceKind::SoftwareGpu).count();
        // Software renderers come last. One is taken only if there is nothing else.
        let candidates = if real > 0 { real } else { gpus.len() };
        if candidates == 0 {
            return Err(TrainError::NoGpu { built_in: HAS_GPU_BACKEND });
        }
        let found = gpus.into_iter().nth(host.local_rank % candidates).expect("a candidate");
        let mut notices = Vec::new();
        let wanted = match dtype {
            DtypeChoice::F32 => FloatType::F32,
            DtypeChoice::F16 => FloatType::F16,
            DtypeChoice::Bf16 => FloatType::BF16,
            DtypeChoice::Auto => stored,
        };
        let compute = if found.types.contains(&wanted) { wanted } else { FloatType::F32 };
        if compute != wanted {
            let (name, wanted) = (&found.name, wanted.name());
            notices.push(format!("{wanted}: {name} does not compute in it through {}; f32 is used", found.api));
        }
        if found.kind == DeviceKind::SoftwareGpu {
            notices
                .push(format!("{} is a software renderer: it computes on the CPU, correctly but slowly", found.name));
        }
        if host.local_world > candidates {
            let name = &found.name;
            let gpus = counted(candidates as u64, "GPU");
            notices.push(format!("{} ranks share {gpus}; this one computes on {name}", host.local_world));
        }
        Ok(DevicePlan { placement: Placement::gpu(found.device.clone(), compute), found, notices })
    }

    /// For people: "NVIDIA H200 (GPU, Vulkan), bf16".
    pub(crate) fn describe(&self) -> String {
        let FoundDevice { name, kind, api, .. } = &self.found;
        match kind {
            DeviceKind::Cpu if self.placement.has_bf16_products() => "CPU, products in bf16".to_owned(),
            DeviceKind::Cpu => "CPU, f32".to_owned(),
            kind => format!("{name} ({}, {api}), {}", kind.name(), self.placement.compute().name()),
        }
    }

    /// "gpu, bf16": what fixes the bits of a run besides its recipe.
    pub(crate) fn compute(&self) -> String {
        if self.placement.has_bf16_products() {
            return "cpu, products in bf16".to_owned();
        }
        let device = if self.placement.is_cpu() { "cpu" } else { "gpu" };
        format!("{device}, {}", self.placement.compute().name())
    }

    /// Bytes that a run may take here, if they can be told. A GPU with memory of its own gives
    /// that. One that shares the host's memory gives the smaller of the two.
    pub fn memory(&self, host: &ThisHost) -> Option<u64> {
        let sharing = |bytes: u64, ranks: usize| bytes / ranks.max(1) as u64;
        let main = host.memory.map(|bytes| sharing(bytes, host.local_world));
        match self.found.kind {
            DeviceKind::Cpu | DeviceKind::SoftwareGpu => main,
            // The driver's own context takes a part, up to about a twentieth.
            DeviceKind::DiscreteGpu => self.found.memory.map(|bytes| bytes - bytes / 20),
            DeviceKind::IntegratedGpu => match (self.found.memory, main) {
                (Some(gpu), Some(main)) => Some(gpu.min(main)),
                (gpu, main) => gpu.or(main),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use finetune_model::{Device, ModelConfig};
    use finetune_recipe::ResidencyChoice;

    use super::*;

    fn gpu(kind: DeviceKind, name: &str, types: &[FloatType]) -> FoundDevice {
        let (device, name, types) = (Device::flex(), name.to_owned(), types.to_vec());
        FoundDevice { device, kind, name, api: "Vulkan", memory: Some(8 << 30), types }
    }

    fn host(local_rank: usize, local_world: usize) -> ThisHost {
        ThisHost { memory: Some(16 << 30), local_rank, local_world, ..ThisHost::default() }
    }

    /// (dtype of the recipe, of the file, what the GPU has, what is computed in, part of a notice)
    #[test]
    fn number_types_fall_back_with_a_notice() {
        use FloatType::{BF16, F16, F32};
        let cases = [
            (DtypeChoice::Auto, BF16, &[F32, F16, BF16][..], BF16, None),
            (DtypeChoice::Auto, F32, &[F32, F16, BF16], F32, None),
            (DtypeChoice::Auto, BF16, &[F32, F16], F32, Some("bf16: card does not compute in it")),
            (DtypeChoice::F16, BF16, &[F32, F16], F16, None),
            (DtypeChoice::Bf16, F32, &[F32], F32, Some("f32 is used")),
            (DtypeChoice::F32, BF16, &[F32, F16, BF16], F32, None),
        ];
        for (dtype, stored, types, compute, notice) in cases {
            let cards = vec![gpu(DeviceKind::DiscreteGpu, "card", types)];
            let device_plan = DevicePlan::gpu(dtype, &host(0, 1), stored, cards).expect("a card");
            assert_eq!(device_plan.placement.compute(), compute, "{dtype:?} {stored:?}");
            assert_eq!(device_plan.notices.len(), usize::from(notice.is_some()), "{:?}", device_plan.notices);
            assert!(notice.is_none_or(|part| device_plan.notices[0].contains(part)), "{:?}", device_plan.notices);
        }
    }

    /// Where a family's activations exceed f16, it is refused; the file may have it.
    #[test]
    fn no_family_computes_in_a_type_that_is_too_narrow() {
        let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models");
        let chosen = |dtype, family: &str| {
            let model = Model {
                path: String::new(),
                device: DeviceChoice::Cpu,
                dtype,
                quantization: None,
                residency: ResidencyChoice::Auto,
            };
            let config = ModelConfig::load(&models.join(family)).expect("a config");
            DevicePlan::choose(&model, &host(0, 1), FloatType::F16, config.family)
        };
        for dtype in [DtypeChoice::Auto, DtypeChoice::F32, DtypeChoice::Bf16] {
            assert!(chosen(dtype, "gemma3").is_ok(), "{dtype:?}");
        }
        assert!(chosen(DtypeChoice::F16, "llama").is_ok());
        let error = chosen(DtypeChoice::F16, "gemma3").expect_err("too narrow").to_string();
        assert!(error.contains("exceed the largest number of f16"), "{error}");
    }

    /// Ranks of a host take its cards in turn. A software renderer is taken only if there is
    /// nothing else.
    #[test]
    fn ranks_take_the_cards_in_turn() {
        let software = || gpu(DeviceKind::SoftwareGpu, "program", &[FloatType::F32]);
        let cards = || {
            let card = |name| gpu(DeviceKind::DiscreteGpu, name, &[FloatType::F32]);
            vec![card("first"), card("second"), software()]
        };
        for (rank, name) in [(0, "first"), (1, "second"), (2, "first"), (3, "second")] {
            let device_plan =
                DevicePlan::gpu(DtypeChoice::F32, &host(rank, 4), FloatType::F32, cards()).expect("a card");
            assert_eq!(device_plan.found.name, name, "rank {rank}");
            assert!(
                device_plan.notices.iter().any(|notice| notice.contains("4 ranks share 2 GPUs")),
                "{:?}",
                device_plan.notices
            );
        }
        let device_plan = DevicePlan::gpu(DtypeChoice::F32, &host(0, 1), FloatType::F32, vec![software()]).expect("it");
        assert!(device_plan.notices[0].contains("is a software renderer"), "{:?}", device_plan.notices);
        let none = DevicePlan::gpu(DtypeChoice::F32, &host(0, 1), FloatType::F32, Vec::new());
        assert!(matches!(none, Err(TrainError::NoGpu { .. })));
    }

    #[test]
    fn memory_is_that_of_the_device() {
        let on = |kind| {
            let found = gpu(kind, "card", &[FloatType::F32]);
            DevicePlan { placement: Placement::cpu(None), found, notices: Vec::new() }.memory(&host(0, 4))
        };
        assert_eq!(on(DeviceKind::DiscreteGpu), Some((8 << 30) - (8 << 30) / 20));
        assert_eq!(on(DeviceKind::IntegratedGpu), Some(4 << 30), "a quarter of the host's");
        assert_eq!(on(DeviceKind::Cpu), Some(4 << 30));
    }
}

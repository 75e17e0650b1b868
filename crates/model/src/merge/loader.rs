//! What the program that loads a packed form has of a model: which matrices it packs and how, and what it calls
//! them.
//!
//! mlx-lm 0.32 has a stack for gate, up and down each of a layer's experts, and packs it like any matrix. It has
//! 8 bits for routers, whatever the other matrices have (`quant_predicate` of its models). transformers 5 has stacks
//! of another kind, which bitsandbytes 0.50 does not pack: experts stay as they are.

use finetune_packed::{Scheme, applies, config_entry};
use serde_json::Value;

use crate::adaptation::{is_expert, module_of};
use crate::adapter::mlx_names::{MlxModule, of_module};
use crate::config::ModelConfig;
use crate::config::family::{InMlx, OtherMixer};
use crate::error::ModelError;
use crate::files::base_files::{BaseFiles, is_linear};

/// The program that loads a form, before a model of this config.
pub(super) struct Loader<'a> {
    config: &'a ModelConfig,
    scheme: Scheme,
}

impl<'a> Loader<'a> {
    /// `opens_stacks`: whether gpt-oss's experts are written in plain numbers, whatever they were.
    ///
    /// # Errors
    /// [`ModelError::NotExpressible`] if it does not load the model in this form.
    pub(super) fn of(
        config: &'a ModelConfig,
        files: &BaseFiles,
        scheme: Scheme,
        opens_stacks: bool,
    ) -> Result<Self, ModelError> {
        let family = config.family;
        let loader = Loader { config, scheme };
        if let (true, Some(InMlx::Unread(why))) = (loader.is_mlx(), family.mixture.map(|mixture| mixture.in_mlx)) {
            return Err(ModelError::NotExpressible {
                what: format!("mlx-lm would not load {} packed in this form: {why}", family.architecture),
                hint: "model.quantization packs a 16-bit base while it is loaded; nf4 and int8, for transformers, \
                       leave experts in 16 bits"
                    .to_owned(),
            });
        }
        if family.has_expert_parameters() && !opens_stacks && files.is_packed(config)? {
            return Err(ModelError::NotExpressible {
                what: format!(
                    "the experts of this {} are in MXFP4, and transformers loads no second form beside it",
                    family.architecture
                ),
                hint: "export without --quantize: the experts stay as they are".to_owned(),
            });
        }
        Ok(loader)
    }

    pub(super) fn is_mlx(&self) -> bool {
        is_mlx(self.scheme)
    }

    /// How a matrix of this name in the model is packed. `None`: it stays in plain numbers.
    pub(super) fn scheme_of(&self, name: &str, shape: [usize; 2]) -> Option<Scheme> {
        let module = module_of(name);
        let is_packed = match (self.is_mlx(), self.is_router(module)) {
            (true, true) => self.config.family.mixture.is_some_and(|mixture| mixture.in_mlx == InMlx::LinearRouter),
            // Gemma 4's is a linear layer in transformers, too.
            (false, true) => self.config.family.has_stacks_only(),
            // mlx-lm makes two matrices of it for each head when it loads it, of plain numbers only without a loss.
            (true, false) => !module.ends_with(".kv_b_proj"),
            (false, false) => !is_expert(module),
        };
        let scheme = if self.has_own_bits(module) { Scheme::Mlx8 } else { self.scheme };
        // mlx-lm asks first whether columns fill the groups of the other matrices.
        let fits = |scheme: Scheme| applies(scheme, shape, is_linear(name));
        (is_packed && fits(self.scheme) && fits(scheme)).then_some(scheme)
    }

    fn is_router(&self, module: &str) -> bool {
        let router = self.config.family.names.router;
        module.strip_suffix(router).is_some_and(|layer| layer.ends_with('.'))
    }

    /// Whether config.json says of a module how it is packed.
    pub(super) fn has_own_bits(&self, module: &str) -> bool {
        self.is_mlx() && self.is_router(module)
    }

    /// What it calls a tensor of the model, and of which expert of that stack it is.
    pub(super) fn place(&self, name: &str) -> MlxModule {
        let MlxModule { name: module, expert } = of_module(module_of(name), self.config);
        let part = name.strip_prefix(module_of(name)).unwrap_or_default();
        MlxModule { name: format!("{module}{part}"), expert }
    }

    /// The shape that it has of a tensor of this shape in a file for transformers: LFM2's convolutions are turned.
    pub(super) fn shape(&self, name: &str, shape: &[usize]) -> Vec<usize> {
        let is_turned =
            self.config.family.other_mixer == OtherMixer::Convolution && name.ends_with(".conv.conv.weight");
        match *shape {
            [channels, 1, taps] if is_turned => vec![channels, taps, 1],
            ref shape => shape.to_vec(),
        }
    }

    /// Keys of config.json, with their values. `modules`: those that have bits of their own.
    pub(super) fn config_entry<'m>(
        &self,
        modules: impl Iterator<Item = &'m str> + Clone,
    ) -> Vec<(&'static str, Value)> {
        let mut entries = config_entry(self.scheme);
        for (_, value) in &mut entries {
            for module in modules.clone() {
                // As mlx-lm writes it: without the mode, which is then the affine one.
                let [bits, group] = ["bits", "group_size"].map(|key| config_entry(Scheme::Mlx8)[0].1[key].clone());
                value[module] = serde_json::json!({"bits": bits, "group_size": group});
            }
        }
        entries
    }
}

/// Whether mlx-lm loads a form, and not transformers with bitsandbytes.
pub(super) fn is_mlx(scheme: Scheme) -> bool {
    matches!(scheme, Scheme::Mlx4 | Scheme::Mlx8 | Scheme::Mxfp4)
}

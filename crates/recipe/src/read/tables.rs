//! The tables of the recipe, key by key.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use toml::de::DeValue;

use super::{Reader, value};
use crate::keys::{Bounds, Kind};
use crate::path;
use crate::problem::{Place, Problem};
use crate::{
    BackendChoice, Checkpoint, Data, DeviceChoice, Distributed, DtypeChoice, Eval, Format, Length, Log, Lora, Method,
    Model, Optimizer, OptimizerName, Overlong, Quantization, Recipe, ResultChoice, Schedule, ScheduleName,
    SharesChoice, TargetModules, TopologyChoice, Train, TrainOn, Warmup,
};

impl Reader<'_> {
    /// Meaningful only if no problems were found.
    pub(crate) fn recipe(&mut self, output_dir: Option<&Path>) -> Recipe {
        Recipe {
            output_dir: self.output_dir(output_dir),
            seed: self.integer("seed"),
            model: self.model(),
            lora: self.lora(),
            data: self.data(),
            train: self.train(),
            optimizer: self.optimizer(),
            schedule: self.schedule(),
            eval: self.eval(),
            checkpoint: self.checkpoint(),
            log: self.log(),
            distributed: self.distributed(),
        }
    }

    fn output_dir(&mut self, given: Option<&Path>) -> PathBuf {
        let written = self.path("output_dir");
        match given {
            Some(given) => path::normalized(given),
            None => written.unwrap_or_else(|| {
                let stem = self.file.file_stem().map_or_else(|| "recipe".into(), |stem| stem.to_string_lossy());
                path::joined(self.file, &format!("runs/{stem}"))
            }),
        }
    }

    fn model(&mut self) -> Model {
        Model {
            path: self.model_path(),
            device: self.choice("model.device", DeviceChoice::from_text),
            dtype: self.choice("model.dtype", DtypeChoice::from_text),
            quantization: self.optional_choice("model.quantization", Quantization::from_text),
        }
    }

    fn lora(&mut self) -> Lora {
        Lora {
            rank: self.count("lora.rank"),
            alpha: self.number("lora.alpha"),
            dropout: self.number("lora.dropout"),
            target_modules: self.target_modules("lora.target_modules"),
            use_rslora: self.boolean("lora.use_rslora"),
            use_dora: self.boolean("lora.use_dora"),
            rank_pattern: self.by_name("lora.rank_pattern", |kind, path, value, place| {
                let Kind::IntegerByName { min } = kind else { unreachable!("{path} is {kind:?}") };
                let rank = value::integer(path, value, place, min)?;
                Ok(usize::try_from(rank).unwrap_or(usize::MAX))
            }),
            alpha_pattern: self.by_name("lora.alpha_pattern", |kind, path, value, place| {
                let Kind::FloatByName(bounds) = kind else { unreachable!("{path} is {kind:?}") };
                value::number(path, value, place, bounds)
            }),
            layers_to_transform: self.indices("lora.layers_to_transform"),
            modules_to_save: self
                .read("lora.modules_to_save", |_, value, place| value::names("lora.modules_to_save", value, place))
                .unwrap_or_default(),
            init_from: self.path("lora.init_from"),
        }
    }

    fn target_modules(&mut self, path: &'static str) -> TargetModules {
        let read = self.read(path, |_, value, place| match value {
            DeValue::String(text) if text == "all-linear" => Ok(TargetModules::AllLinear),
            DeValue::String(_) => Ok(TargetModules::Regex(value::text(path, value, place)?.to_owned())),
            DeValue::Array(items) if items.is_empty() => {
                Err(Problem::new(place.clone(), format!("`{path}` must name a module")).hint("or \"all-linear\""))
            }
            DeValue::Array(_) => Ok(TargetModules::Names(value::names(path, value, place)?)),
            other => Err(value::wrong_type("\"all-linear\", a list of names, or a regular expression", other, place)),
        });
        read.unwrap_or(TargetModules::AllLinear)
    }

    fn by_name<T>(
        &mut self,
        path: &'static str,
        item: impl Fn(Kind, &str, &DeValue<'_>, &Place) -> Result<T, Problem>,
    ) -> BTreeMap<String, T> {
        let read = self.read(path, |kind, value, place| {
            let DeValue::Table(entries) = value else {
                let problem = value::wrong_type("a table of module names and numbers", value, place);
                return Err(problem.hint("for example { \"q_proj\" = 8 }"));
            };
            entries
                .iter()
                .map(|(name, value)| {
                    let value = item(kind, path, value.get_ref(), &place.part(value.span()))?;
                    Ok((name.get_ref().to_string(), value))
                })
                .collect()
        });
        read.unwrap_or_default()
    }

    /// A list of layers, or one layer.
    fn indices(&mut self, path: &'static str) -> Option<Vec<usize>> {
        let index = |value: &DeValue<'_>, place: &Place| {
            value::integer(path, value, place, 0).map(|index| usize::try_from(index).unwrap_or(usize::MAX))
        };
        self.read(path, |_, value, place| match value {
            DeValue::Array(items) if items.is_empty() => {
                Err(Problem::new(place.clone(), format!("`{path}` must name a layer"))
                    .hint("leave it out for all layers"))
            }
            DeValue::Array(items) => items.iter().map(|item| index(item.get_ref(), &place.part(item.span()))).collect(),
            DeValue::Integer(_) => Ok(vec![index(value, place)?]),
            other => Err(value::wrong_type("a list of layers, counted from 0", other, place)),
        })
    }

    fn data(&mut self) -> Data {
        Data {
            train: self.paths("data.train"),
            eval: self.paths("data.eval"),
            format: self.choice("data.format", Format::from_text),
            max_seq_len: self.count("data.max_seq_len"),
            overlong: self.choice("data.overlong", Overlong::from_text),
            packing: self.boolean("data.packing"),
            train_on: self.choice("data.train_on", TrainOn::from_text),
            shuffle: self.boolean("data.shuffle"),
            chat_template: self.path("data.chat_template"),
            date: self.text("data.date"),
        }
    }

    fn train(&mut self) -> Train {
        let epochs = self.integer("train.epochs");
        Train {
            method: self.choice("train.method", Method::from_text),
            length: self.optional_integer("train.max_steps").map_or(Length::Epochs(epochs), Length::Steps),
            global_batch_size: self.count("train.global_batch_size"),
            micro_batch_size: self.count("train.micro_batch_size"),
            max_grad_norm: self.number("train.max_grad_norm"),
            gradient_checkpointing: self.boolean("train.gradient_checkpointing"),
        }
    }

    fn optimizer(&mut self) -> Optimizer {
        Optimizer {
            name: self.choice("optimizer.name", OptimizerName::from_text),
            learning_rate: self.number("optimizer.learning_rate"),
            betas: self.number_pair("optimizer.betas", Bounds::BelowOne),
            eps: self.number("optimizer.eps"),
            weight_decay: self.number("optimizer.weight_decay"),
        }
    }

    fn schedule(&mut self) -> Schedule {
        let steps = self.integer("schedule.warmup_steps");
        Schedule {
            name: self.choice("schedule.name", ScheduleName::from_text),
            warmup: self.optional_number("schedule.warmup_ratio").map_or(Warmup::Steps(steps), Warmup::Ratio),
            min_lr_ratio: self.number("schedule.min_lr_ratio"),
        }
    }

    fn eval(&mut self) -> Eval {
        Eval {
            every: self.integer("eval.every"),
            early_stopping_patience: self.optional_integer("eval.early_stopping_patience"),
            samples: self.count("eval.samples"),
            exact_match: self.count("eval.exact_match"),
            max_new_tokens: self.count("eval.max_new_tokens"),
        }
    }

    fn checkpoint(&mut self) -> Checkpoint {
        Checkpoint {
            every: self.integer("checkpoint.every"),
            keep_last: self.count("checkpoint.keep_last"),
            keep_best: self.boolean("checkpoint.keep_best"),
            result: self.optional_choice("checkpoint.result", ResultChoice::from_text),
            copies: self.optional_count("checkpoint.copies"),
        }
    }

    fn log(&mut self) -> Log {
        Log { every: self.integer("log.every"), prometheus: self.text("log.prometheus") }
    }

    fn distributed(&mut self) -> Distributed {
        Distributed {
            backend: self.choice("distributed.backend", BackendChoice::from_text),
            topology: self.choice("distributed.topology", TopologyChoice::from_text),
            timeout: self.duration("distributed.timeout"),
            virtual_ranks: self.optional_count("distributed.virtual_ranks"),
            min_ranks: self.optional_count("distributed.min_ranks"),
            join_timeout: self.optional_duration("distributed.join_timeout"),
            ports: self.ports("distributed.ports"),
            shares: self.choice("distributed.shares", SharesChoice::from_text),
        }
    }
}

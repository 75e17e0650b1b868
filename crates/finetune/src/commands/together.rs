//! Ranks that hold one model together to use it, by layers or by slices of all layers: `finetune launch -- generate`
//! and `-- serve`.

use std::path::Path;
use std::sync::Arc;

use finetune_model::adapter::Adapter;
use finetune_model::{Model, ModelConfig, Placement, not_in_slices, slice_bytes};
use finetune_rendezvous::Membership;
use finetune_trainer::{OnRank, Parallel, Sizes, ThisHost, Together, stored_type};

use crate::cli::{ModelArguments, ParallelArgument, ResidencyArgument};
use crate::commands::opening::device_plan;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::membership::{self, Assignment};
use crate::memory;
use crate::progress::Verbosity;
use crate::rank_event;
use crate::signals::Signals;

/// This rank of a command that the launcher has started.
pub(crate) struct OneOf {
    assignment: Assignment,
    /// What must be the same on all ranks.
    words: String,
    verbosity: Verbosity,
}

impl OneOf {
    /// Reads the rank's place from standard input. `words`: what must be the same on all ranks.
    pub(crate) fn assigned(signals: &Arc<Signals>, words: String, verbosity: Verbosity) -> Result<OneOf, Failure> {
        let assignment = Assignment::read(signals)?;
        membership::share_cores(&assignment.membership);
        finetune_store::failpoint::set_label(assignment.membership.rank.to_string());
        Ok(OneOf { assignment, words, verbosity })
    }

    /// Whether this rank speaks for all.
    pub(crate) fn is_first(&self) -> bool {
        self.assignment.membership.rank == 0
    }

    /// Only the first rank speaks.
    pub(crate) fn verbosity(&self) -> Verbosity {
        if self.is_first() { self.verbosity } else { Verbosity::Quiet }
    }

    /// Tells the others why this rank has failed before it could join them.
    pub(crate) fn excuse(&self, failure: &Failure) {
        membership::excuse(&self.assignment.membership, failure);
    }

    /// Joins the others, to hold the model in a directory together, packed as it was when `adapter` was trained on it.
    /// `None` if there is only this rank. `say` gets what the user should know of how they hold it.
    pub(crate) fn join(
        &self,
        model: &Path,
        adapter: Option<&Path>,
        arguments: &ModelArguments,
        parallel: ParallelArgument,
        say: &dyn Fn(&str),
    ) -> Result<Option<Together>, Failure> {
        let config = ModelConfig::load(model)?;
        let group = membership::join_to_use(&self.assignment, &self.words, self.verbosity)?;
        let world = group.world();
        if world == 1 {
            return Ok(None);
        }
        let host = self.host();
        let sizes = || self.sizes(model, adapter, &config, arguments, &host);
        let together = Together::connect(group, model, adapter, &config, parallel.into(), host.clone(), sizes)?;
        together.notes.iter().for_each(|note| say(note));
        Ok(Some(together))
    }

    /// This rank's place on its host, which decides on the GPU and the memory that it gets.
    fn host(&self) -> ThisHost {
        let Membership { local_rank, local_world, .. } = self.assignment.membership;
        ThisHost { memory: memory::machine_bytes(), local_rank, local_world, ..ThisHost::default() }
    }

    /// How large the base is, from the headers of its files, and what this rank has for it.
    fn sizes(
        &self,
        model: &Path,
        adapter: Option<&Path>,
        config: &ModelConfig,
        arguments: &ModelArguments,
        host: &ThisHost,
    ) -> Result<Sizes, Failure> {
        let world = self.assignment.membership.world;
        let adapter = adapter.map(|adapter| Adapter::read(adapter, config)).transpose()?;
        let plan = device_plan(model, arguments, adapter.and_then(|adapter| adapter.base.quantization), host)?;
        let (available, placement) = (plan.memory(host), plan.placement);
        let form = Model::form(model, placement.quantization())?;
        let held = placement.held(stored_type(model));
        let layers = form.layers.iter().map(|layer| layer.bytes(held)).collect();
        let [embedding, output] = form.ends.map(|end| end.bytes(held));
        // An embedding that is the output layer too is with both.
        let ends = [embedding, if output == 0 { embedding } else { output }];
        let elements: u64 = form.layers.iter().map(|layer| layer.dense + layer.packed.elements).sum();
        let used = 1.0 - config.idle_parameters() as f64 / elements.max(1) as f64;
        let bandwidth = (!placement.is_cpu()).then_some(OF_GPU);
        let is_split = not_in_slices(config, world).is_none();
        let slice = if is_split { slice_bytes(config, &form, held, world) } else { 0 };
        let may_read = arguments.residency != ResidencyArgument::Memory;
        Ok(Sizes { layers, ends, slice, used, bandwidth, available, may_read })
    }
}

/// Bytes a second that a GPU is taken to read its weights with. Those of Apple's and of others' small machines
/// have 100 to 1,000 GB/s.
const OF_GPU: f64 = 200e9;

/// The placement of this rank's layers, or of its slice of them.
pub(crate) fn placed(placement: Placement, together: Option<&Together>) -> Placement {
    match together.map(|together| &together.part) {
        None => placement,
        Some(OnRank::Stage(stage)) => placement.with_stage(Some(stage.clone())),
        Some(OnRank::Slice(slice)) => placement.with_slice(Some(*slice)),
    }
}

/// Connects a loaded model with the other ranks. All of them call it.
pub(crate) fn connect(model: &mut Model, together: Option<&Together>) -> Result<(), Failure> {
    let Some(together) = together else { return Ok(()) };
    match together.part {
        OnRank::Stage(_) => model.connect(Arc::clone(&together.hops)),
        OnRank::Slice(_) => model.connect_slices(together.sums()),
    }
    model.set_all_on_cpu(together.all_say(model.placement().is_cpu())?);
    Ok(())
}

/// A failure of ranks that use a model: nothing is kept of what they did, and there is nothing to resume.
pub(crate) fn without_resume(failure: Failure) -> Failure {
    if failure.exit() != Exit::PeerLost {
        return failure;
    }
    let again = "run the same command again; `launch --max-restarts N` does so by itself".to_owned();
    let others = failure.hints().into_iter().filter(|hint| !hint.contains("--resume"));
    let hints = others.chain([again]).collect();
    failure.with_hints(hints)
}

/// Tells the launcher if another rank's failure has ended this one.
pub(crate) fn tell_of(failure: &Failure) {
    if let Some(event) = rank_event::of_failure(failure) {
        rank_event::send(&event);
    }
}

impl From<ParallelArgument> for Parallel {
    fn from(parallel: ParallelArgument) -> Parallel {
        match parallel {
            ParallelArgument::Stages => Parallel::Stages,
            ParallelArgument::Tensor => Parallel::Tensor,
            ParallelArgument::Auto => Parallel::Auto,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ranks of one host take its GPUs in turn and share its memory, as in training.
    #[test]
    fn a_rank_knows_its_place_on_its_host() {
        let membership = Membership { rank: 3, world: 4, local_rank: 1, local_world: 2, ..Membership::alone() };
        let assignment = Assignment { membership, ports: None, narrates: false };
        let host = OneOf { assignment, words: String::new(), verbosity: Verbosity::Quiet }.host();
        assert_eq!((host.local_rank, host.local_world), (1, 2));
        assert_eq!(host.memory, memory::machine_bytes());
    }
}

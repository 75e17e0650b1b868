//! `[parallel]`: one model over several ranks.

use crate::kind::{CountOrAuto, Counts, word};
use crate::{PlacementChoice, StagesChoice};

table! {
    [parallel]
    /// How the layers of a model are spread over ranks.
    pub struct Parallel {
        /// ranks that hold the layers of one model together, with the bits of one process: layer n is
        /// on the (n mod stages)th of them, where they are alike; the number of ranks is a multiple;
        /// `auto`: as few as have the memory
        stages: StagesChoice = CountOrAuto, default(StagesChoice::Count(1)), Shared, [
            "pipeline_parallel_size", "pipeline_stages", "num_stages", "pp_size", "pp",
            "pipeline_parallel_degree", "pipeline_model_parallel_size", "parallel.pipeline_parallel",
            "parallel.pipeline", "parallel.ranks" => "how many processes run is for finetune launch -n",
        ];
        /// with `stages`: how many layers each of these ranks holds, in their order; all layers of the
        /// model together
        layers: Vec<usize> = Counts,
            empty("as many on each as on any other, unless they differ in memory or, by a quarter or more, in speed"),
            Shared, [
            "layer_split", "layers_per_stage", "parallel.counts", "parallel.split", "tensor_split",
        ];
        /// how the layers of these ranks lie: `ring`: in turn; `contiguous`: next to each other; `wave`:
        /// in turn there and back; the last two need no cable from the last rank to the first; `auto`:
        /// `ring`, or where the cables form a chain `contiguous`, with layers from the disk `wave`
        placement: PlacementChoice = word::<PlacementChoice>(), default(PlacementChoice::Auto), Shared, [
            "pipeline_parallel_schedule", "pipeline_schedule", "pp_schedule",
            "parallel.arrangement", "parallel.order", "parallel.schedule",
        ];
    }
}

//! `[parallel]`: one model over several ranks.

use crate::StagesChoice;
use crate::kind::CountOrAuto;

table! {
    [parallel]
    /// How the layers of a model are spread over ranks.
    pub struct Parallel {
        /// ranks that hold the layers of one model together: layer n is on the (n mod stages)th of
        /// them, with the bits of one process; the number of ranks is a multiple; `auto`: as few as
        /// have the memory
        stages: StagesChoice = CountOrAuto, default(StagesChoice::Count(1)), Shared, [
            "pipeline_parallel_size", "pipeline_stages", "num_stages", "pp_size", "pp",
            "parallel.pipeline", "parallel.ranks" => "how many processes run is for finetune launch -n",
            "tensor_parallel_size" => "layers are spread whole: stages",
        ];
    }
}

//! Short convolutions and gated delta rules on a GPU: not there. Models with them are kept on the CPU
//! (`Family::cpu_only` in finetune-model), so nothing reaches these.

use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;

use crate::fused::Fused;
use crate::operations::{DeltaRule, ShortConvolution};

const WHY: &str = "models with gated delta rules are computed on the CPU";

impl Fused<CubeBackend, 3> for ShortConvolution {
    type Saved = ();

    fn forward(self, _: [CubeTensor; 3], _: [bool; 3]) -> (CubeTensor, ()) {
        unreachable!("{WHY}")
    }

    fn backward((): (), _: CubeTensor, _: [bool; 3]) -> [Option<CubeTensor>; 3] {
        unreachable!("{WHY}")
    }
}

impl Fused<CubeBackend, 4> for DeltaRule {
    type Saved = ();

    fn forward(self, _: [CubeTensor; 4], _: [bool; 4]) -> (CubeTensor, ()) {
        unreachable!("{WHY}")
    }

    fn backward((): (), _: CubeTensor, _: [bool; 4]) -> [Option<CubeTensor>; 4] {
        unreachable!("{WHY}")
    }
}

//! Gated units on a GPU.

use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;

use super::pointwise;
use crate::arguments::Activation;
use crate::fused::Fused;
use crate::operations::Gated;

impl Fused<CubeBackend, 2> for Gated {
    type Saved = ([CubeTensor; 2], Activation);

    fn forward(self, [gate, up]: [CubeTensor; 2], _: [bool; 2]) -> (CubeTensor, Self::Saved) {
        (pointwise::gated(&gate, &up, self.activation), ([gate, up], self.activation))
    }

    fn backward(([gate, up], activation): Self::Saved, d_out: CubeTensor, _: [bool; 2]) -> [Option<CubeTensor>; 2] {
        let (d_gate, d_up) = pointwise::gated_backward(&gate, &up, &d_out, activation);
        [Some(d_gate), Some(d_up)]
    }
}

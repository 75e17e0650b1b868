//! SwiGLU on a GPU.

use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;

use super::pointwise;
use crate::fused::Fused;
use crate::operations::Swiglu;

impl Fused<CubeBackend, 2> for Swiglu {
    type Saved = [CubeTensor; 2];

    fn forward(self, [gate, up]: [CubeTensor; 2], _: [bool; 2]) -> (CubeTensor, [CubeTensor; 2]) {
        (pointwise::swiglu(&gate, &up), [gate, up])
    }

    fn backward([gate, up]: [CubeTensor; 2], d_out: CubeTensor, _: [bool; 2]) -> [Option<CubeTensor>; 2] {
        let (d_gate, d_up) = pointwise::swiglu_backward(&gate, &up, &d_out);
        [Some(d_gate), Some(d_up)]
    }
}

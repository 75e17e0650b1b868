//! The gated delta rule on a GPU: that of [`crate::chunked`].

use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;

use crate::fused::Fused;
use crate::operations::{ChunkedDeltaRule, DeltaRule};

type InChunks = <ChunkedDeltaRule as Fused<CubeBackend, 4>>::Saved;

impl Fused<CubeBackend, 4> for DeltaRule {
    type Saved = InChunks;

    fn forward(self, tensors: [CubeTensor; 4], trained: [bool; 4]) -> (CubeTensor, InChunks) {
        Fused::<CubeBackend, 4>::forward(ChunkedDeltaRule { shape: self.shape }, tensors, trained)
    }

    fn backward(saved: InChunks, d_out: CubeTensor, wanted: [bool; 4]) -> [Option<CubeTensor>; 4] {
        <ChunkedDeltaRule as Fused<CubeBackend, 4>>::backward(saved, d_out, wanted)
    }
}

//! Products by head are not there: [`crate::by_head`] composes them, so nothing reaches these.

use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;

use crate::fused::Fused;
use crate::operations::{HeadProduct, PackedHeadProduct};

impl Fused<CubeBackend, 2> for HeadProduct {
    type Saved = ();

    fn forward(self, _: [CubeTensor; 2], _: [bool; 2]) -> (CubeTensor, ()) {
        unreachable!("products by head are composed on a GPU")
    }

    fn backward((): (), _: CubeTensor, _: [bool; 2]) -> [Option<CubeTensor>; 2] {
        unreachable!("products by head are composed on a GPU")
    }
}

impl Fused<CubeBackend, 1> for PackedHeadProduct {
    type Saved = ();

    fn forward(self, _: [CubeTensor; 1], _: [bool; 1]) -> (CubeTensor, ()) {
        unreachable!("products by head are composed on a GPU")
    }

    fn backward((): (), _: CubeTensor, _: [bool; 1]) -> [Option<CubeTensor>; 1] {
        unreachable!("products by head are composed on a GPU")
    }
}

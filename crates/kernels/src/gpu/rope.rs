//! Rotary position embedding on a GPU.

use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;

use super::pointwise;
use super::tensor::upload_f32;
use crate::arguments::RopeTable;
use crate::fused::Fused;
use crate::operations::Rope;

impl Fused<CubeBackend, 1> for Rope {
    type Saved = RopeTable;

    fn forward(self, [x]: [CubeTensor; 1], _: [bool; 1]) -> (CubeTensor, RopeTable) {
        (rotate(&x, &self.table, 1.0), self.table)
    }

    fn backward(table: RopeTable, d_out: CubeTensor, _: [bool; 1]) -> [Option<CubeTensor>; 1] {
        [Some(rotate(&d_out, &table, -1.0))]
    }
}

/// x [t, heads, d]; `sign` 1 turns, -1 turns back, which is the backward pass.
fn rotate(x: &CubeTensor, table: &RopeTable, sign: f32) -> CubeTensor {
    let upload = || (upload_f32(x, &table.cosines), upload_f32(x, &table.sines));
    let (cosines, sines) = table.on_device.get(0, upload);
    pointwise::rotate(x, &cosines, &sines, sign)
}

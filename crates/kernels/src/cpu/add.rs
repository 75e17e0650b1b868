//! Sums of two tensors: the residual connection and the bias. burn's own kernels do the work.

use burn::backend::ops::FloatTensorOps;
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::Shape;
use burn_flex::FlexTensor;

use crate::fused::Fused;
use crate::operations::{Bias, Residual};

impl Fused<Flex, 2> for Residual {
    type Saved = ();

    fn forward(self, [a, b]: [FlexTensor; 2], _: [bool; 2]) -> (FlexTensor, ()) {
        (Flex::float_add(a, b), ())
    }

    fn backward(_: (), d_out: FlexTensor, wanted: [bool; 2]) -> [Option<FlexTensor>; 2] {
        wanted.map(|wanted| wanted.then(|| d_out.clone()))
    }
}

impl Fused<Flex, 2> for Bias {
    type Saved = ();

    fn forward(self, [y, bias]: [FlexTensor; 2], _: [bool; 2]) -> (FlexTensor, ()) {
        let outputs = bias.shape().num_elements();
        (Flex::float_add(y, Flex::float_reshape(bias, Shape::from([1, outputs]))), ())
    }

    fn backward(_: (), d_y: FlexTensor, [y_wanted, bias_wanted]: [bool; 2]) -> [Option<FlexTensor>; 2] {
        let d_bias = bias_wanted.then(|| {
            let outputs = d_y.shape()[1];
            Flex::float_reshape(Flex::float_sum_dim(d_y.clone(), 0), Shape::from([outputs]))
        });
        [y_wanted.then_some(d_y), d_bias]
    }
}

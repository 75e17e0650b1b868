//! The operations as a burn backend extension: [`Fused`] operations made differentiable, and the
//! macro behind the table in [`crate::operations`].

use std::marker::PhantomData;
use std::sync::{Arc, OnceLock};

use burn::backend::Autodiff;
use burn::backend::TensorMetadata;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::tensor::{FloatDType, Shape, TensorData};

use crate::fused::{Contiguous, Fused};
use crate::operations::{GradientSeed, LateGradient};

/// The operation on a backend without automatic differentiation: nothing is saved.
pub(crate) fn without_gradients<B, O, const N: usize>(operation: O, inputs: [FloatTensor<B>; N]) -> FloatTensor<B>
where
    B: Contiguous,
    O: Fused<B, N>,
{
    operation.without_gradients(inputs.map(B::contiguous))
}

/// The operation on a backend with automatic differentiation. If an input requires gradients, the
/// backward pass of the operation becomes a step of the graph.
pub(crate) fn differentiable<B, C, O, const N: usize>(
    operation: O,
    inputs: [FloatTensor<Autodiff<B, C>>; N],
) -> FloatTensor<Autodiff<B, C>>
where
    B: Contiguous,
    C: CheckpointStrategy,
    O: Fused<B, N>,
{
    let nodes = inputs.each_ref().map(|tensor| tensor.node());
    let trained = inputs.each_ref().map(|tensor| tensor.is_tracked());
    let inputs = inputs.map(|tensor| B::contiguous(tensor.into_primitive()));
    let step = Step::<O, B>(PhantomData);
    match Backward::<B, N>::prepare::<C>(step, nodes).compute_bound().stateful() {
        OpsKind::Tracked(step) => {
            let (out, saved) = operation.forward(inputs, trained);
            step.finish(saved, out)
        }
        OpsKind::UnTracked(step) => step.finish(operation.without_gradients(inputs)),
    }
}

/// The backward pass of operation `O` as burn takes it: a type without a value, whose state is what
/// the forward pass saved.
#[derive(Debug)]
struct Step<O, B>(PhantomData<(O, B)>);

impl<O, B, const N: usize> Backward<B, N> for Step<O, B>
where
    B: Contiguous,
    O: Fused<B, N>,
{
    type State = O::Saved;

    fn backward(self, ops: Ops<O::Saved, N>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let d_out = B::contiguous(gradients.consume::<B>(&ops.node));
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let results = <O as Fused<B, N>>::backward(ops.state, d_out, wanted);
        for (node, gradient) in ops.parents.into_iter().zip(results) {
            if let (Some(node), Some(gradient)) = (node, gradient) {
                gradients.register::<B>(node.id, gradient);
            }
        }
    }
}

/// The upstream gradient is that of a sum, 1. The gradient that flows on is therefore the seed
/// itself.
impl<B: Contiguous> Fused<B, 2> for GradientSeed {
    type Saved = FloatTensor<B>;

    fn forward(self, [y, d_y]: [FloatTensor<B>; 2], _: [bool; 2]) -> (FloatTensor<B>, FloatTensor<B>) {
        (B::float_zeros(Shape::from([1]), &y.device(), FloatDType::F32), d_y)
    }

    fn backward(d_y: FloatTensor<B>, _: FloatTensor<B>, _: [bool; 2]) -> [Option<FloatTensor<B>>; 2] {
        [Some(d_y), None]
    }
}

/// A part of a gradient, row-major, that is set before the backward pass begins.
pub type LatePart = Arc<OnceLock<Vec<f32>>>;

impl<B: Contiguous> Fused<B, 1> for LateGradient {
    type Saved = LatePart;

    fn forward(self, [y]: [FloatTensor<B>; 1], _: [bool; 1]) -> (FloatTensor<B>, LatePart) {
        (y, self.part)
    }

    fn backward(part: LatePart, d_y: FloatTensor<B>, _: [bool; 1]) -> [Option<FloatTensor<B>>; 1] {
        let part = part.get().expect("set before the backward pass").clone();
        let part = B::float_from_data(TensorData::new(part, d_y.shape()), &d_y.device());
        [Some(B::float_add(d_y, part))]
    }
}

/// The table of operations. A row is the public function with its documentation, then the name of
/// the operation's type, and perhaps a condition on the arguments with the message of the panic
/// otherwise:
///
/// ```text
/// fn name(tensor: Tensor<2>, ..; setting: Type, ..) -> Tensor<2> = Operation,
///     requires condition, "message";
/// ```
///
/// Tensors come before the semicolon, everything else after it. A row generates
/// - the public function, on tensors of any device,
/// - the type, whose fields are the settings: backends implement [`Fused`] for it,
/// - the method of the trait `Kernels` that burn dispatches to the backend of the tensors, and its
///   implementations for every backend, with and without automatic differentiation.
macro_rules! operations {
    ($(
        $(#[$meta:meta])*
        fn $name:ident $(<const $D:ident: usize>)? (
            $($tensor:ident: Tensor<$rank:tt>),+ $(; $($setting:ident: $type:ty),+)?
        ) -> Tensor<$out:tt> = $operation:ident $(, requires $condition:expr, $message:literal)?;
    )+) => {
        $(
            $(#[$meta])*
            pub fn $name $(<const $D: usize>)? (
                $($tensor: burn::tensor::Tensor<$rank>),+ $($(, $setting: $type)+)?
            ) -> burn::tensor::Tensor<$out> {
                $(assert!($condition, $message);)?
                burn::tensor::Tensor::from_dispatch(<burn::backend::Dispatch as Kernels>::$name(
                    $($tensor.into_dispatch()),+ $($(, $setting)+)?
                ))
            }

            #[derive(Debug)]
            pub(crate) struct $operation { $($(pub(crate) $setting: $type),+)? }
        )+

        #[burn::backend::backend_extension(Flex, Cube: cfg(gpu_backend), Autodiff)]
        pub(crate) trait Kernels: burn::backend::Backend {
            $(
                fn $name(
                    $($tensor: burn::backend::tensor::FloatTensor<Self>),+ $($(, $setting: $type)+)?
                ) -> burn::backend::tensor::FloatTensor<Self>;
            )+
        }

        $crate::extension::operations_on! {
            burn::backend::Flex;
            $($name [$($tensor)+] [$($($setting: $type,)+)?] = $operation;)+
        }
        #[cfg(gpu_backend)]
        $crate::extension::operations_on! {
            burn_cubecl::CubeBackend;
            $($name [$($tensor)+] [$($($setting: $type,)+)?] = $operation;)+
        }
    };
}
pub(crate) use operations;

/// The implementations of `Kernels` for one backend: see [`operations`].
macro_rules! operations_on {
    (
        $backend:ty;
        $($name:ident [$($tensor:ident)+] [$($setting:ident: $type:ty,)*] = $operation:ident;)+
    ) => {
        impl Kernels for $backend {
            $(
                fn $name(
                    $($tensor: burn::backend::tensor::FloatTensor<Self>,)+ $($setting: $type,)*
                ) -> burn::backend::tensor::FloatTensor<Self> {
                    $crate::extension::without_gradients::<$backend, _, _>(
                        $operation { $($setting),* },
                        [$($tensor),+],
                    )
                }
            )+
        }

        impl<C> Kernels for burn::backend::Autodiff<$backend, C>
        where
            C: burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy,
        {
            $(
                fn $name(
                    $($tensor: burn::backend::tensor::FloatTensor<Self>,)+ $($setting: $type,)*
                ) -> burn::backend::tensor::FloatTensor<Self> {
                    $crate::extension::differentiable::<$backend, C, _, _>(
                        $operation { $($setting),* },
                        [$($tensor),+],
                    )
                }
            )+
        }
    };
}
pub(crate) use operations_on;

//! Mixtures of experts: each operation compared with its composed form, value and every gradient.
//!
//! The tests run on the CPU. With `FINETUNE_TEST_DEVICE=gpu` they run on the first GPU, a software
//! renderer if there is no other.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use burn::tensor::{Device, Tensor, TensorData};
use finetune_kernels::devices::{gpus, is_cpu};
use finetune_kernels::{
    Dispatch, ExpertWeights, FloatType, FrozenValues, PackedWeight, Scores, Shelf, composed, operations,
};
use finetune_random::Stream;
use half::{bf16, f16};

mod tested;

const TOKENS: usize = 13;
const EXPERTS: usize = 7;
const CHOICES: usize = 3;
const INPUTS: usize = 20;
const OUTPUTS: usize = 9;
const RANK: usize = 2;

fn device() -> Device {
    tested::device().autodiff()
}

fn normal(seed: u64, count: usize) -> Vec<f32> {
    Stream::new(seed, 9, 0, 0).normal(count, 1.0)
}

fn tensor(values: Vec<f32>, shape: [usize; 2]) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values, shape), &device())
}

/// Each token chooses three of seven experts, in ascending order; nobody chooses expert 2.
fn chosen() -> Vec<u32> {
    (0..TOKENS as u32)
        .flat_map(|token| {
            let mut of_token = [token % 2, 3 + token % 3, 6];
            of_token.sort_unstable();
            of_token
        })
        .collect()
}

fn dispatch() -> Dispatch {
    Dispatch::new(&chosen(), CHOICES, EXPERTS)
}

/// The value of an operation over these inputs, and its gradient for each of them.
fn run(inputs: &[(Vec<f32>, [usize; 2])], operation: &dyn Fn(&[Tensor<2>]) -> Tensor<2>) -> Vec<Vec<f32>> {
    let tensors: Vec<Tensor<2>> =
        inputs.iter().map(|(values, shape)| tensor(values.clone(), *shape).require_grad()).collect();
    let out = operation(&tensors);
    let [rows, columns] = out.dims();
    let gradients = (out.clone() * tensor(normal(77, rows * columns), [rows, columns])).sum().backward();
    let floats = |tensor: Tensor<2>| tensor.into_data().try_to_vec::<f32>().expect("f32 data");
    let of_inputs = tensors.iter().map(|input| floats(input.grad(&gradients).expect("a gradient")));
    std::iter::once(floats(out.clone().inner())).chain(of_inputs).collect()
}

/// Panics if value or gradients of two operations lie apart.
fn compare(
    name: &str,
    inputs: &[(Vec<f32>, [usize; 2])],
    fused: &dyn Fn(&[Tensor<2>]) -> Tensor<2>,
    composed: &dyn Fn(&[Tensor<2>]) -> Tensor<2>,
) {
    for (n, (got, want)) in run(inputs, fused).iter().zip(run(inputs, composed)).enumerate() {
        let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
        let difference = norm(&mut got.iter().zip(&want).map(|(a, b)| f64::from(*a) - f64::from(*b)));
        let size = norm(&mut want.iter().map(|v| f64::from(*v)));
        let what = if n == 0 { "value".to_owned() } else { format!("gradient of input {}", n - 1) };
        assert!(got.len() == want.len() && size > 0.1, "{name}: {what} of another size");
        assert!(difference <= 1e-5 * size, "{name}: {what}: relative difference {:e}", difference / size);
    }
}

#[test]
fn weights_of_the_chosen() {
    let inputs = [(normal(1, TOKENS * EXPERTS), [TOKENS, EXPERTS])];
    for scores in [Scores::Softmax, Scores::Sigmoid] {
        for (normalized, scale) in [(None, 1.0), (Some(0.0), 1.0), (Some(1e-2), 2.5)] {
            let rule = ExpertWeights { scores, normalized, scale };
            compare(
                &format!("{rule:?}"),
                &inputs,
                &|inputs| operations::expert_weights(inputs[0].clone(), chosen().into(), rule),
                &|inputs| composed::expert_weights(inputs[0].clone(), &chosen(), rule),
            );
        }
    }
}

#[test]
fn rows_by_expert_and_their_sum() {
    compare(
        "dispatch_rows",
        &[(normal(1, TOKENS * INPUTS), [TOKENS, INPUTS])],
        &|inputs| operations::dispatch_rows(inputs[0].clone(), dispatch()),
        &|inputs| composed::dispatch_rows(inputs[0].clone(), &dispatch()),
    );
    let rows = TOKENS * CHOICES;
    compare(
        "combine",
        &[(normal(1, rows * OUTPUTS), [rows, OUTPUTS]), (normal(2, rows), [TOKENS, CHOICES])],
        &|inputs| operations::combine(inputs[0].clone(), inputs[1].clone(), dispatch()),
        &|inputs| composed::combine(inputs[0].clone(), inputs[1].clone(), &dispatch()),
    );
}

/// Whether the device computes in a number type.
fn computes_in(kind: FloatType) -> bool {
    is_cpu(&device()) || gpus(true).into_iter().next().is_some_and(|gpu| gpu.types.contains(&kind))
}

/// Weights of the experts, held in each number type of the device, and what they are in f32.
fn experts() -> Vec<(Arc<[PackedWeight]>, Vec<Tensor<2>>)> {
    let values: Vec<Vec<f32>> = (0..EXPERTS).map(|expert| normal(100 + expert as u64, OUTPUTS * INPUTS)).collect();
    let held = |round: fn(&[f32]) -> (FrozenValues, Vec<f32>)| {
        let shape = [OUTPUTS, INPUTS];
        let rounded: Vec<_> = values.iter().map(|values| round(values)).collect();
        let weights =
            rounded.iter().map(|(values, _)| PackedWeight::of_values(values.clone(), shape, &device())).collect();
        (weights, rounded.into_iter().map(|(_, values)| tensor(values, shape)).collect())
    };
    type Round = fn(&[f32]) -> (FrozenValues, Vec<f32>);
    let all: [(FloatType, Round); 3] = [
        (FloatType::F32, |values| (FrozenValues::F32(values.to_vec()), values.to_vec())),
        (FloatType::F16, |values| {
            let halves: Vec<f16> = values.iter().map(|&value| f16::from_f32(value)).collect();
            let floats = halves.iter().map(|half| half.to_f32()).collect();
            (FrozenValues::F16(halves), floats)
        }),
        (FloatType::BF16, |values| {
            let halves: Vec<bf16> = values.iter().map(|&value| bf16::from_f32(value)).collect();
            let floats = halves.iter().map(|half| half.to_f32()).collect();
            (FrozenValues::Bf16(halves), floats)
        }),
    ];
    all.into_iter().filter(|(kind, _)| computes_in(*kind)).map(|(_, round)| held(round)).collect()
}

#[test]
fn products_with_each_rows_expert() {
    let rows = TOKENS * CHOICES;
    for (held, dense) in experts() {
        compare(
            "expert_linear",
            &[(normal(1, rows * INPUTS), [rows, INPUTS])],
            &|inputs| operations::expert_linear(inputs[0].clone(), held.clone(), dispatch()),
            &|inputs| composed::expert_linear(inputs[0].clone(), &dense, &dispatch()),
        );
        compare(
            "expert_lora_linear",
            &[
                (normal(1, rows * INPUTS), [rows, INPUTS]),
                (normal(2, EXPERTS * RANK * INPUTS), [EXPERTS * RANK, INPUTS]),
                (normal(3, EXPERTS * OUTPUTS * RANK), [EXPERTS * OUTPUTS, RANK]),
            ],
            &|inputs| {
                let [x, a, b] = [0, 1, 2].map(|n| inputs[n].clone());
                operations::expert_lora_linear(x, a, b, held.clone(), dispatch(), 0.5)
            },
            &|inputs| {
                let [x, a, b] = [0, 1, 2].map(|n| inputs[n].clone());
                composed::expert_lora_linear(x, a, b, &dense, &dispatch(), 0.5)
            },
        );
    }
}

/// Nobody chooses expert 2.
#[test]
fn an_expert_without_tokens_gets_zeros() {
    let a = tensor(normal(2, EXPERTS * RANK * INPUTS), [EXPERTS * RANK, INPUTS]).require_grad();
    let b = tensor(normal(3, EXPERTS * OUTPUTS * RANK), [EXPERTS * OUTPUTS, RANK]);
    let x = tensor(normal(1, TOKENS * CHOICES * INPUTS), [TOKENS * CHOICES, INPUTS]);
    let (held, _) = experts().remove(0);
    let gradients = operations::expert_lora_linear(x, a.clone(), b, held, dispatch(), 1.0).sum().backward();
    let d_a = a.grad(&gradients).expect("a gradient").into_data().try_to_vec::<f32>().expect("f32 data");
    for (expert, block) in d_a.chunks(RANK * INPUTS).enumerate() {
        assert_eq!(block.iter().all(|&d| d == 0.0), expert == 2, "expert {expert}");
    }
}

/// A shelf that has its matrices in memory, and cannot read those from `readable` on.
#[derive(Debug)]
struct InMemory {
    experts: Arc<[PackedWeight]>,
    readable: usize,
}

impl Shelf for InMemory {
    fn bring(&self, numbers: Vec<usize>) -> Receiver<PackedWeight> {
        let (give, brought) = sync_channel(1);
        let readable = numbers.into_iter().take_while(|number| *number < self.readable);
        let experts: Vec<PackedWeight> = readable.map(|number| self.experts[number].clone()).collect();
        std::thread::spawn(move || experts.into_iter().try_for_each(|expert| give.send(expert)));
        brought
    }

    fn waited(&self, _: Duration) {}
}

/// The same experts on a shelf.
fn shelved(experts: &Arc<[PackedWeight]>, readable: usize) -> Arc<[PackedWeight]> {
    let shelf: Arc<dyn Shelf> = Arc::new(InMemory { experts: experts.clone(), readable });
    (0..EXPERTS).map(|number| PackedWeight::on_shelf(shelf.clone(), number, [OUTPUTS, INPUTS])).collect()
}

/// Values and gradients of both products with these experts, as bits.
fn bits_of_products(experts: &Arc<[PackedWeight]>) -> Vec<Vec<u32>> {
    let rows = TOKENS * CHOICES;
    let x = (normal(1, rows * INPUTS), [rows, INPUTS]);
    let a = (normal(2, EXPERTS * RANK * INPUTS), [EXPERTS * RANK, INPUTS]);
    let b = (normal(3, EXPERTS * OUTPUTS * RANK), [EXPERTS * OUTPUTS, RANK]);
    let plain = run(std::slice::from_ref(&x), &|inputs| {
        operations::expert_linear(inputs[0].clone(), experts.clone(), dispatch())
    });
    let with_branches = run(&[x, a, b], &|inputs| {
        let [x, a, b] = [0, 1, 2].map(|n| inputs[n].clone());
        operations::expert_lora_linear(x, a, b, experts.clone(), dispatch(), 0.5)
    });
    plain.into_iter().chain(with_branches).map(|values| values.into_iter().map(f32::to_bits).collect()).collect()
}

/// With as many threads as there are, and with one, which waits for what is read.
#[test]
fn experts_from_a_shelf_have_the_bits_of_those_in_memory() {
    if !is_cpu(&device()) {
        return;
    }
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
    for (held, _) in experts() {
        let want = bits_of_products(&held);
        let on_shelf = shelved(&held, EXPERTS);
        assert!(bits_of_products(&on_shelf) == want, "all threads");
        assert!(one.install(|| bits_of_products(&on_shelf)) == want, "one thread");
    }
}

/// The rows of an expert that cannot be read are no numbers, and those of the others are as ever.
#[test]
fn an_expert_that_cannot_be_read_makes_no_numbers() {
    if !is_cpu(&device()) {
        return;
    }
    let (held, _) = experts().into_iter().next().expect("experts in f32");
    let rows = TOKENS * CHOICES;
    let y = |experts: Arc<[PackedWeight]>| {
        let x = tensor(normal(1, rows * INPUTS), [rows, INPUTS]);
        let y = operations::expert_linear(x, experts, dispatch()).into_data();
        y.try_to_vec::<f32>().expect("f32 data")
    };
    let (want, got) = (y(held.clone()), y(shelved(&held, 4)));
    for ((expert, want), got) in dispatch().experts().zip(want.chunks(OUTPUTS)).zip(got.chunks(OUTPUTS)) {
        match expert < 4 {
            true => assert_eq!(got, want, "expert {expert}"),
            false => assert!(got.iter().all(|value| value.is_nan()), "expert {expert}: {got:?}"),
        }
    }
}

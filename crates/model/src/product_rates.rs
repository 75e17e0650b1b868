//! How fast this CPU makes the products of a training step with the matrices of a base, as they will be held, and
//! with as many tokens at a time as a micro-batch has: a few of its matrices are read and multiplied.
//!
//! That takes a fraction of a second, whatever the base: of large matrices only some outputs are multiplied.

use std::collections::BTreeMap;
use std::path::Path;

use finetune_kernels::matmul::JOB;
use finetune_kernels::product_time::{ProductSeconds, of_experts, of_linears};
use finetune_kernels::{PackedWeight, Weight};
use finetune_packed::{applies, quantize};

use crate::config::ModelConfig;
use crate::files::base_files::BaseFiles;
use crate::files::fetch::{Fetched, fetch};
use crate::files::packing;
use crate::placement::Placement;
use crate::slice::{Along, Cut};
use crate::tree::{Decoder, Matrix};

/// Multiplications of each thread, forward and again backward.
const WORK: usize = 3 << 28;
/// The most elements that are multiplied: with few tokens at a time, reading them takes longest.
const MOST_ELEMENTS: usize = 32 << 20;
/// Packed matrices are read whole. Larger ones than this take too long.
const MOST_READ: usize = 256 << 20;
/// Outputs of which a part is taken: no block of rows that share scales is cut.
const OUTPUTS: usize = 256;

/// Operations per second of a step's products, a multiplication and an addition being two.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ProductRates {
    /// Of the forward pass.
    pub forward: f64,
    /// Of the gradients of activations.
    pub backward: f64,
}

/// The rates of products of this many tokens with the matrices of a base's layers. Of experts, each has the rows
/// that it would have if all were chosen equally often. The call measures them.
///
/// `None`: not on the CPU, or the matrices cannot be read, or are not here.
pub fn product_rates(base: &Path, placement: &Placement, tokens: usize) -> Option<ProductRates> {
    if !placement.is_cpu() {
        return None;
    }
    let (config, files) = (ModelConfig::load(base).ok()?, BaseFiles::read(base).ok()?);
    let mut decoder = Decoder::new(&config);
    let ends: usize =
        [Some(&decoder.embedding), decoder.head.output.as_ref()].into_iter().flatten().map(elements).sum();
    let of_layers = decoder.linears().map(|linear| &linear.weight);
    let (experts, others): (Vec<&Matrix>, Vec<&Matrix>) = of_layers.partition(|matrix| matrix.is_of_expert);
    // More rows at a time are no faster, once each thread has some of its own.
    let bounded = |rows: usize| rows.clamp(1, JOB * rayon::current_num_threads().max(2));
    let files = Files { files, config: &config, placement };
    let always =
        files.rates(&others, bounded(tokens), |weights, rows| of_linears(weights, rows, placement.device()))?;
    let Some(mixture) = config.experts.as_ref().filter(|_| !experts.is_empty()) else { return Some(always) };
    let (choices, count) = (mixture.choices, mixture.count.max(1));
    let rows = bounded((tokens * choices).div_ceil(count));
    let chosen = files.rates(&experts, rows, |weights, rows| {
        let packed = |weight: &Weight| if let Weight::Packed(packed) = weight { Some(packed.clone()) } else { None };
        let experts: Vec<PackedWeight> = weights.iter().filter_map(packed).collect();
        of_experts(&experts, rows, placement.device())
    })?;
    let sum = |matrices: &[&Matrix]| matrices.iter().map(|matrix| elements(matrix)).sum::<usize>();
    let (of_all, of_chosen) = (ends + sum(&others), sum(&experts) / count * choices);
    Some(always.beside(of_all as f64, chosen, of_chosen as f64))
}

fn elements(matrix: &Matrix) -> usize {
    matrix.shape.iter().product()
}

impl ProductRates {
    /// Of so many products that take these seconds. `None` if that cannot be.
    fn of(seconds: ProductSeconds, products: usize) -> Option<ProductRates> {
        let rate = |seconds: f64| 2.0 * products as f64 / seconds;
        let rates = ProductRates { forward: rate(seconds.forward), backward: rate(seconds.backward) };
        let is_rate = |rate: f64| rate.is_finite() && rate > 0.0;
        (is_rate(rates.forward) && is_rate(rates.backward)).then_some(rates)
    }

    /// Of products of which a part is at these rates and a part at others.
    fn beside(self, part: f64, other: ProductRates, other_part: f64) -> ProductRates {
        let rate = |mine: f64, other: f64| (part + other_part) / (part / mine + other_part / other);
        ProductRates { forward: rate(self.forward, other.forward), backward: rate(self.backward, other.backward) }
    }
}

/// What is multiplied of matrices [o, i] of one shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Portion {
    /// How many of them.
    matrices: usize,
    /// Their first outputs.
    outputs: usize,
}

/// What takes this many threads a fraction of a second with so many rows, and gives all of them work.
fn portion([outputs, inputs]: [usize; 2], rows: usize, threads: usize) -> Portion {
    let elements = (WORK * threads / rows.max(1)).min(MOST_ELEMENTS);
    // Products are split into parts of at least so many rows and columns.
    let parts = threads.div_ceil((rows / JOB).clamp(1, threads.max(1)));
    let wanted = (elements / inputs.max(1)).max(JOB * parts).next_multiple_of(OUTPUTS);
    let outputs = wanted.min(outputs);
    Portion { matrices: (elements / (outputs * inputs).max(1)).max(1), outputs }
}

/// The files of a base, and how its matrices are held.
struct Files<'a> {
    files: BaseFiles,
    config: &'a ModelConfig,
    placement: &'a Placement,
}

impl Files<'_> {
    /// The rates of products of so many rows with those of the matrices that most elements are in. `measure`: the
    /// seconds of the products with some matrices.
    fn rates(
        &self,
        matrices: &[&Matrix],
        rows: usize,
        measure: impl Fn(&[Weight], usize) -> ProductSeconds,
    ) -> Option<ProductRates> {
        let mut kinds: BTreeMap<[usize; 2], Vec<&Matrix>> = BTreeMap::new();
        for matrix in matrices.iter().filter(|matrix| elements(matrix) <= MOST_READ) {
            kinds.entry(matrix.shape).or_default().push(matrix);
        }
        let (shape, kind) =
            kinds.into_iter().max_by_key(|(shape, kind)| shape.iter().product::<usize>() * kind.len())?;
        let portion = portion(shape, rows, rayon::current_num_threads());
        // Of a base of which only the headers are here, none can be read: the others are not tried.
        let held = kind.into_iter().map_while(|matrix| self.held(matrix, portion.outputs));
        let weights: Vec<Weight> = held.take(portion.matrices).collect();
        ProductRates::of(measure(&weights, rows), weights.len() * portion.outputs * shape[1] * rows)
    }

    /// The first outputs of a matrix as it will be held.
    fn held(&self, matrix: &Matrix, outputs: usize) -> Option<Weight> {
        let mut matrix = matrix.clone();
        if outputs < matrix.shape[0] {
            matrix.keep(Cut { whole: matrix.shape, along: Along::Rows(std::iter::once(0..outputs).collect()) });
        }
        let tensor = self.files.tensor(self.config, &matrix.name, &matrix.whole_shape()).ok()?;
        let tensor = tensor.part(matrix.cut.clone());
        let scheme = self.placement.quantization().filter(|scheme| applies(*scheme, matrix.shape, true));
        let fetched = match scheme.zip(tensor.dtype()) {
            // The values differ where scales go over several rows, but not the time.
            Some((scheme, dtype)) => {
                let values = tensor.values().ok()?;
                Fetched::Packed(quantize(scheme, &values, matrix.shape, packing::stored(dtype)).ok()?)
            }
            None => fetch(&self.files, self.config, self.placement, &matrix).ok()?,
        };
        Some(fetched.onto(matrix.shape, self.placement))
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use finetune_packed::Scheme;

    use super::*;

    fn golden(family: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models").join(family)
    }

    /// (shape, rows, threads, matrices, outputs of each)
    #[test]
    fn a_portion_is_quick_and_keeps_all_threads_busy() {
        for (shape, rows, threads, matrices, outputs) in [
            // Few tokens: as many elements as are read in little time.
            ([25_600, 5120], 16, 2, 1, 6656),
            ([576, 576], 16, 2, 101, 576),
            // Many: fewer outputs.
            ([25_600, 5120], 544, 2, 1, 768),
            ([1536, 576], 544, 2, 3, 1536),
            // Columns for each of many threads, or rows.
            ([25_600, 5120], 16, 64, 1, 17_408),
            ([25_600, 5120], 17_408, 64, 1, 768),
        ] {
            let want = Portion { matrices, outputs };
            assert_eq!(portion(shape, rows, threads), want, "{shape:?} {rows} {threads}");
        }
    }

    #[test]
    fn parts_at_different_rates_take_their_time() {
        let [slow, fast] = [(50.0, 20.0), (100.0, 20.0)].map(|(forward, backward)| ProductRates { forward, backward });
        // 3 at 100 and 1 at 50: 4 in 0.05.
        assert_eq!(fast.beside(3.0, slow, 1.0), ProductRates { forward: 80.0, backward: 20.0 });
    }

    #[test]
    fn what_takes_no_time_has_no_rate() {
        let of = |forward, products| ProductRates::of(ProductSeconds { forward, backward: 0.5 }, products);
        assert_eq!(of(0.25, 10), Some(ProductRates { forward: 80.0, backward: 40.0 }));
        assert_eq!(of(0.0, 10), None);
        assert_eq!(of(f64::INFINITY, 10), None);
        assert_eq!(of(0.25, 0), None);
    }

    /// Dense and with experts, as the files have it, in f32, and packed while it is loaded.
    #[test]
    fn bases_are_measured_as_they_are_held() {
        let cpu = || Placement::cpu(None);
        for family in ["qwen3", "qwen3_moe"] {
            for placement in [cpu(), Placement::cpu(Some(finetune_kernels::FloatType::F32))]
                .into_iter()
                .chain([Scheme::Nf4, Scheme::Int8].map(|scheme| cpu().quantized(Some(scheme))))
            {
                for tokens in [1, 16, 300] {
                    let rates = product_rates(&golden(family), &placement, tokens);
                    assert!(rates.is_some(), "{family} {placement:?} {tokens}");
                }
            }
        }
    }

    /// Only a config: there is nothing to measure with.
    #[test]
    fn without_weights_there_are_no_rates() {
        let folder = tempfile::tempdir().expect("a directory");
        std::fs::copy(golden("qwen3").join("config.json"), folder.path().join("config.json")).expect("a config");
        assert_eq!(product_rates(folder.path(), &Placement::cpu(None), 16), None);
        assert_eq!(product_rates(&folder.path().join("none"), &Placement::cpu(None), 16), None);
    }
}

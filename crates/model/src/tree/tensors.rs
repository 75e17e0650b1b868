//! Vectors and matrices of the tree, absent or loaded.

use burn::tensor::{DType, Device, Tensor, TensorData};
use finetune_kernels::weight::packed_rows;
use finetune_kernels::{PackedWeight, Weight};

use crate::error::ModelError;
use crate::files::by_row::ByRow;
use crate::slice::{Cut, VectorCut};

/// A vector of the model, in f32.
#[derive(Clone, Debug)]
pub(crate) struct Vector {
    pub(crate) name: String,
    pub(crate) length: usize,
    /// What is here of a longer one. `None`: all of it.
    pub(crate) cut: Option<VectorCut>,
    /// The value of each element in a fresh model.
    pub(crate) fresh: f32,
    values: Option<Tensor<1>>,
}

/// A matrix of the model.
#[derive(Clone, Debug)]
pub(crate) struct Matrix {
    pub(crate) name: String,
    /// [o, i], or [v, hidden].
    pub(crate) shape: [usize; 2],
    /// What is here of a larger one. `None`: all of it.
    pub(crate) cut: Option<Cut>,
    /// Whether it is an expert's: frozen, and multiplied together with those of the other experts.
    pub(crate) is_of_expert: bool,
    /// Whether its rows are read from the file when they are needed, if the file has all of their elements.
    pub(crate) is_by_row: bool,
    /// `None`: not loaded, the tree only describes it.
    pub(super) weight: Option<Weight>,
    /// Its rows in the file, in the place of its weight.
    pub(super) by_row: Option<ByRow>,
}

impl Vector {
    pub(crate) fn new(name: String, length: usize, fresh: f32) -> Vector {
        Vector { name, length, cut: None, fresh, values: None }
    }

    /// The length of all of it, wherever it is.
    pub(crate) fn whole_length(&self) -> usize {
        self.cut.as_ref().map_or(self.length, VectorCut::whole)
    }

    /// Keeps these elements.
    pub(crate) fn keep(&mut self, cut: VectorCut) {
        self.length = cut.length();
        self.cut = Some(cut);
    }

    /// The values of a loaded vector.
    pub(crate) fn values(&self) -> &Tensor<1> {
        self.values.as_ref().expect("the vector is loaded")
    }

    pub(crate) fn set(&mut self, values: Tensor<1>) {
        self.values = Some(values);
    }
}

impl Matrix {
    pub(crate) fn new(name: String, shape: [usize; 2]) -> Matrix {
        Matrix { name, shape, cut: None, is_of_expert: false, is_by_row: false, weight: None, by_row: None }
    }

    /// The shape of all of it, wherever it is.
    pub(crate) fn whole_shape(&self) -> [usize; 2] {
        self.cut.as_ref().map_or(self.shape, |cut| cut.whole)
    }

    /// Keeps this part.
    pub(crate) fn keep(&mut self, cut: Cut) {
        self.shape = cut.shape();
        self.cut = Some(cut);
    }

    /// The matrix of an expert.
    pub(crate) fn frozen(&self) -> &PackedWeight {
        match self.weight() {
            Weight::Packed(packed) => packed,
            Weight::Dense(_) => panic!("{} is no expert's", self.name),
        }
    }

    /// A loaded matrix, dense or packed.
    pub(crate) fn weight(&self) -> &Weight {
        self.weight.as_ref().expect("the matrix is loaded")
    }

    /// The elements of a matrix that is never packed: one that is trained, or a part of a branch.
    pub(crate) fn dense(&self) -> &Tensor<2> {
        match self.weight() {
            Weight::Dense(tensor) => tensor,
            Weight::Packed(_) => panic!("{} is packed", self.name),
        }
    }

    /// All elements in f32, without a gradient. A packed matrix is decoded, one that is read by row is read as a whole.
    ///
    /// # Errors
    /// If the file cannot be read, or a number is not finite.
    pub(crate) fn in_f32(&self, device: &Device) -> Result<Tensor<2>, ModelError> {
        if let Some(by_row) = &self.by_row {
            let values = TensorData::new(by_row.read_all()?, self.shape);
            return Ok(Tensor::from_data(values, (device, DType::F32)));
        }
        Ok(match self.weight() {
            Weight::Dense(tensor) => tensor.clone().inner().cast(DType::F32),
            Weight::Packed(packed) => {
                let like = Tensor::<1>::zeros([1], (device, DType::F32));
                packed_rows(like, packed.clone(), (0..self.shape[0] as u32).collect())
            }
        })
    }

    /// Its rows in the file, if they are read from there.
    pub(crate) fn by_row(&self) -> Option<&ByRow> {
        self.by_row.as_ref()
    }

    pub(crate) fn set_by_row(&mut self, rows: ByRow) {
        self.by_row = Some(rows);
    }

    pub(crate) fn set(&mut self, tensor: Tensor<2>) {
        self.set_weight(Weight::Dense(tensor));
    }

    /// Puts a weight in the place of another one, or of the rows in the file.
    pub(crate) fn set_weight(&mut self, weight: Weight) {
        (self.weight, self.by_row) = (Some(weight), None);
    }

    /// Whether it is neither loaded nor read by row.
    pub(crate) fn is_absent(&self) -> bool {
        self.weight.is_none() && self.by_row.is_none()
    }

    /// Takes over the elements of another matrix.
    pub(crate) fn set_as(&mut self, other: &Matrix) {
        (self.weight, self.by_row) = (other.weight.clone(), other.by_row.clone());
    }
}

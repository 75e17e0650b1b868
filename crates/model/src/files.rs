//! The files of a Hugging Face model directory: config, tensors and their numbers, and the files
//! that go along with the weights.
//!
//! Must never know: how a model computes. Start reading at [`base_files`], then [`load`].

pub(crate) mod base_files;
pub(crate) mod by_row;
pub(crate) mod companions;
pub(crate) mod config_alone;
pub(crate) mod config_json;
mod extra;
pub(crate) mod fetch;
pub(crate) mod finite;
pub(crate) mod floats;
pub(crate) mod load;
pub(crate) mod of_rank;
pub(crate) mod packing;
mod part;
mod stacked;
mod taking_turns;
pub(crate) mod text;
pub(crate) mod wrapper;

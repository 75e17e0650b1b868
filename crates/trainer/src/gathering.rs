//! The vectors of what is trained, on their way between the ranks that each have a part and the files of rank 0.
//!
//! Where several ranks hold the layers of a model together, each has values and moments of its own layers. For a
//! checkpoint rank 0 gets them in the order of the file, and on a resume it gives them out in that order, each piece
//! to the ranks that hold its layers: no rank but rank 0 ever has a piece of what is another's.

use std::ops::Range;
use std::path::Path;

use finetune_allreduce::GroupError;
use finetune_model::{FlatFile, FlatReader, Held, Spread};
use finetune_store::failpoint;

use crate::error::TrainError;
use crate::ranks::Ranks;

/// Elements that travel at a time, unless a parameter has more.
const PIECE: usize = 1 << 18;

/// Parameters of one process that follow each other in a file.
#[derive(Debug, PartialEq, Eq)]
struct Piece {
    process: usize,
    /// The number of the vector, and elements of the part of it that the process has.
    parts: Vec<(usize, Range<usize>)>,
    length: usize,
}

/// The pieces of a file, in its order. It has one vector behind the other: values, or moments.
fn pieces(spread: &Spread, file: &FlatFile) -> Vec<Piece> {
    let whole = spread.whole().len();
    let mut pieces: Vec<Piece> = Vec::new();
    for part in file.parts() {
        let Held { process, range } = spread.beginning_at(part.start % whole).clone();
        let (vector, length) = (part.start / whole, range.len());
        match pieces.last_mut() {
            Some(piece) if piece.process == process && piece.length + length <= PIECE => {
                piece.parts.push((vector, range));
                piece.length += length;
            }
            _ => pieces.push(Piece { process, parts: vec![(vector, range)], length }),
        }
    }
    pieces
}

impl Piece {
    /// The values of a piece that this rank has.
    fn of(&self, vectors: &[&[f32]]) -> Vec<f32> {
        self.parts.iter().flat_map(|(vector, range)| &vectors[*vector][range.clone()]).copied().collect()
    }
}

/// The values of a file in its order, on rank 0.
pub(crate) struct Gathered<'a> {
    ranks: &'a Ranks,
    mine: usize,
    vectors: Vec<&'a [f32]>,
    pieces: std::vec::IntoIter<Piece>,
    /// What is left of the piece that came last.
    rest: std::vec::IntoIter<f32>,
}

impl<'a> Gathered<'a> {
    /// `vectors`: what this rank has of each.
    pub(crate) fn new(ranks: &'a Ranks, spread: &Spread, file: &FlatFile, vectors: Vec<&'a [f32]>) -> Gathered<'a> {
        let pieces = pieces(spread, file).into_iter();
        Gathered { ranks, mine: spread.mine(), vectors, pieces, rest: Vec::new().into_iter() }
    }

    /// The values of the next parameter, so many.
    ///
    /// # Errors
    /// If its rank is lost.
    pub(crate) fn next(&mut self, length: usize) -> Result<Vec<f32>, GroupError> {
        if self.rest.len() == 0
            && let Some(piece) = self.pieces.next()
        {
            self.rest = self.values_of(&piece)?.into_iter();
        }
        Ok(self.rest.by_ref().take(length).collect())
    }

    fn values_of(&self, piece: &Piece) -> Result<Vec<f32>, GroupError> {
        // What came before may have taken long to write.
        self.ranks.keep_alive();
        if piece.process == self.mine {
            return Ok(piece.of(&self.vectors));
        }
        let mut values = vec![0.0; piece.length];
        // Rank 0 is of the first model, whose ranks are counted as its stages.
        self.ranks.group().recv(&mut values, piece.process)?;
        Ok(values)
    }
}

/// Gives rank 0 what this rank has of the vectors of a file: [`Gathered`] on the other side. Only ranks of the first
/// model do.
///
/// # Errors
/// If rank 0 is lost.
pub(crate) fn send(ranks: &Ranks, spread: &Spread, file: &FlatFile, vectors: &[&[f32]]) -> Result<(), GroupError> {
    if ranks.is_first() || ranks.replica() > 0 {
        return Ok(());
    }
    for piece in pieces(spread, file).iter().filter(|piece| piece.process == spread.mine()) {
        failpoint::hit("moments.send");
        ranks.group().send(&piece.of(vectors), 0)?;
    }
    Ok(())
}

/// Reads a file on rank 0 and gives each rank what it has of the vectors, and nothing else. All ranks call it
/// together. `directory`: where the file is, on rank 0.
///
/// # Errors
/// If the file cannot be read or has other tensors, or the group fails.
pub(crate) fn read(
    ranks: &Ranks,
    spread: &Spread,
    file: &FlatFile,
    directory: Option<&Path>,
    vectors: &mut [&mut [f32]],
) -> Result<(), TrainError> {
    let reader = directory.map(|directory| file.open(directory)).transpose()?;
    // The tensor that is read next, and what was read and is not given out yet.
    let (mut tensor, mut read) = (0, Vec::new());
    // Rank 0 goes through the whole file, any other rank through its own pieces of it.
    let is_needed = |piece: &Piece| reader.is_some() || piece.process == spread.mine();
    for piece in pieces(spread, file).into_iter().filter(is_needed) {
        let mut values = match &reader {
            Some(reader) => {
                fill(&mut read, piece.length, reader, &mut tensor)?;
                let rest = read.split_off(piece.length);
                std::mem::replace(&mut read, rest)
            }
            None => vec![0.0; piece.length],
        };
        hand_out(ranks, piece.process, &mut values)?;
        if piece.process != spread.mine() {
            continue;
        }
        let mut values = values.as_slice();
        for (vector, range) in piece.parts {
            let (own, rest) = values.split_at(range.len());
            vectors[vector][range].copy_from_slice(own);
            values = rest;
        }
    }
    Ok(())
}

/// Gives what rank 0 has read to the ranks that hold the layers of `process`, one of each model. Rank 0 and these call
/// it together.
fn hand_out(ranks: &Ranks, process: usize, values: &mut [f32]) -> Result<(), GroupError> {
    let (group, stages) = (ranks.group(), ranks.stages());
    if stages == 1 {
        // All need it, and pass it on to each other where that is faster.
        return group.broadcast(values, 0);
    }
    if !ranks.is_first() {
        return group.recv(values, 0);
    }
    (process..group.world()).step_by(stages).filter(|rank| *rank != 0).try_for_each(|rank| group.send(values, rank))
}

/// Reads tensor after tensor until there are so many values.
fn fill(read: &mut Vec<f32>, length: usize, reader: &FlatReader<'_>, tensor: &mut usize) -> Result<(), TrainError> {
    while read.len() < length {
        read.extend(reader.values(*tensor)?);
        *tensor += 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use finetune_allreduce::Group;
    use finetune_model::{Model, ModelConfig, Placement, Stage, choose};
    use finetune_recipe::Recipe;
    use finetune_store::{Dtype, RealDisk, encode_tensors, replace_file};

    use super::*;
    use crate::loss_scale::LossScale;
    use crate::state::TrainState;

    /// A model with an adapter, of which this process holds the layers of `stage`.
    fn model(family: &str, targets: &str, stage: Option<Stage>) -> Model {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models").join(family);
        let text = format!(
            "output_dir = \"run\"\n[model]\npath = \"m\"\n[lora]\nrank = 2\ntarget_modules = {targets}\n[data]\ntrain = \"t\"\n"
        );
        let recipe = Recipe::parse(&text, Path::new("r.toml"), &[], None).unwrap_or_else(|error| panic!("{error}"));
        let config = ModelConfig::load(&directory).expect("a config");
        let adaptation = choose(&recipe.lora, &config).expect("an adaptation");
        let mut model = Model::load(&directory, &Placement::cpu(None).with_stage(stage)).expect("a model");
        model.add_adapter(adaptation, 1).expect("an adapter");
        model
    }

    /// Values and moments that say where in the whole vectors they are: element n has n, n + 0.5 and -n.
    fn numbered(model: &Model) -> TrainState {
        let mut state = TrainState::new(vec![0.0; model.layout().len()], LossScale::ONE);
        for (parameter, held) in model.spread().whole().iter().zip(model.spread().held()) {
            for (n, own) in parameter.range.clone().zip(held.range.clone()) {
                if held.process == model.spread().mine() {
                    state.parameters[own] = n as f32;
                    state.optimizer.first_moment[own] = n as f32 + 0.5;
                    state.optimizer.second_moment[own] = -(n as f32);
                }
            }
        }
        state
    }

    /// The bytes of a file as rank 0 makes it of what all ranks have.
    fn bytes(ranks: &Ranks, model: &Model, file: &FlatFile, vectors: Vec<&[f32]>) -> Vec<u8> {
        let mut gathered = Gathered::new(ranks, model.spread(), file, vectors);
        let mut tensors = Vec::new();
        for (n, spec) in file.specs().into_iter().enumerate() {
            let lengths = file.lengths(n).into_iter();
            let parts: Vec<Vec<f32>> = lengths.map(|length| gathered.next(length).expect("values")).collect();
            tensors.push((spec.name, Dtype::F32, spec.shape, Cow::Owned(file.bytes(n, &parts))));
        }
        encode_tensors(&tensors, &FlatFile::metadata()).expect("a file")
    }

    /// Ranks give rank 0 what each has, and get it back: the files are those of one process, in which the elements
    /// have their numbers in order.
    #[test]
    fn vectors_go_to_rank_0_and_back() {
        for (family, targets) in
            [("qwen3_5", "\"all-linear\""), ("gpt_oss_mxfp4_experts", "[\"v_proj\", \"experts\", \"lm_head\"]")]
        {
            let alone = model(family, targets, None);
            let (state, layers) = (numbered(&alone), alone.config.layers.len());
            assert!(state.parameters.iter().enumerate().all(|(n, value)| *value == n as f32), "numbers in order");
            let ranks = Ranks::alone(None).expect("one rank");
            let values = alone.values_file().expect("a file").expect("values");
            let of_one = [
                bytes(&ranks, &alone, &values, vec![&state.parameters]),
                bytes(&ranks, &alone, &state.optimizer_file(&alone), state.optimizer_vectors()),
            ];
            for (world, stages) in [(2, 2), (3, 3), (4, 2)] {
                if stages > layers {
                    continue;
                }
                let folder = tempfile::tempdir().expect("a directory");
                let (folder, of_one) = (folder.path(), &of_one);
                let part = |group: Group| {
                    let ranks = Ranks::new(group, None).expect("ranks");
                    ranks.settle(stages).expect("stages");
                    let model =
                        model(family, targets, Some(Stage::in_turn(layers, stages, ranks.group().rank() % stages)));
                    let state = numbered(&model);
                    let files = [model.values_file().expect("a file").expect("values"), state.optimizer_file(&model)];
                    let vectors = [vec![state.parameters.as_slice()], state.optimizer_vectors()];
                    for ((file, vectors), want) in files.iter().zip(vectors).zip(of_one) {
                        if ranks.is_first() {
                            let made = bytes(&ranks, &model, file, vectors);
                            assert!(made == *want, "{family}, {stages} stages: another {}", file.name);
                            replace_file(&RealDisk, &folder.join(&file.name), &made).expect("written");
                        } else {
                            send(&ranks, model.spread(), file, &vectors).expect("sent");
                        }
                    }
                    let mut back = TrainState::new(vec![0.0; state.parameters.len()], LossScale::ONE);
                    let from = ranks.is_first().then_some(folder);
                    let (_, before) = ranks.group().bytes_moved();
                    back.load_vectors(from, &model, &ranks).expect("the files");
                    assert!(back == state, "{family}, {stages} stages: other vectors on rank {}", ranks.group().rank());
                    // Values and two moments of its own layers, and nothing of what others hold.
                    let (_, after) = ranks.group().bytes_moved();
                    let own = if ranks.is_first() { 0 } else { 3 * 4 * state.parameters.len() as u64 };
                    assert_eq!(after - before, own, "{family}, {stages} stages: bytes that a resume brings");
                    state.parameters.len()
                };
                let part = &part;
                let lengths: Vec<usize> = std::thread::scope(|scope| {
                    let start = |group| scope.spawn(move || part(group));
                    let threads: Vec<_> = Group::in_process(world, None).into_iter().map(start).collect();
                    threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
                });
                let whole = state.parameters.len();
                assert_eq!(lengths[..stages].iter().sum::<usize>(), whole, "each has its part");
                assert!(lengths.iter().all(|length| (1..whole).contains(length)), "{lengths:?}");
            }
        }
    }

    /// What a rank sends at a time is bounded, and parameters are never cut.
    #[test]
    fn pieces_are_bounded() {
        let model = model("qwen3_5", "\"all-linear\"", None);
        let file = model.values_file().expect("a file").expect("values");
        let all = pieces(model.spread(), &file);
        assert_eq!(all.iter().map(|piece| piece.length).sum::<usize>(), model.layout().len());
        assert!(all.iter().all(|piece| piece.length <= PIECE || piece.parts.len() == 1));
    }
}

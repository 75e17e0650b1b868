//! Keys and values of one layer: of one row, or of several that end at the same place.

use std::ops::Range;

use burn::tensor::{Int, Tensor, TensorData};

use super::reach::Reach;
use super::room;

/// Keys and values of one layer, [rows, room, k, d] each: those of the places from `start` on, as earlier ones are
/// forgotten. Every row ends before place `length`. The room grows by a third or a half when it is full, so most tokens
/// cost no copy of the earlier ones. Latent attention has keys alone, one head of them, which hold its short vectors.
#[derive(Clone, Default)]
pub(crate) struct LayerCache {
    pub(super) keys: Option<Tensor<4>>,
    values: Option<Tensor<4>>,
    pub(super) start: usize,
    length: usize,
    pub(super) reach: Reach,
    /// Of a gated delta net: the last inputs of the convolution and the states, each of all rows.
    recurrent: Option<[Tensor<2>; 2]>,
    /// In the place of all that: the caches of single rows, and how many tokens of each are read next.
    pub(super) apart: Vec<(LayerCache, usize)>,
}

impl LayerCache {
    pub(super) fn new(reach: Reach) -> LayerCache {
        LayerCache { reach, ..LayerCache::default() }
    }

    /// Places of each row that are not forgotten.
    pub(super) fn held(&self) -> usize {
        self.length - self.start
    }

    /// Forgets all but the first `length` tokens. The room stays.
    pub(super) fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
    }

    /// Forgets what no later token sees, if a window and the room for the next pass leave no place for it.
    pub(crate) fn forget(&mut self) {
        self.apart.iter_mut().for_each(|(row, _)| row.forget());
        let first = self.reach.first(self.start, self.length);
        if first > self.start {
            self.move_to(first, self.length);
        }
    }

    /// Puts the caches of single rows together, which only go on. All end before place `end`, which is at least the
    /// length of each.
    pub(super) fn join(rows: Vec<LayerCache>, end: usize) -> LayerCache {
        let count = rows.len();
        let reach = rows.first().map_or(Reach::default(), |row| row.reach.going_on());
        let start = reach.first(0, end);
        let mut joined = LayerCache { start, length: end, ..LayerCache::new(reach) };
        let recurrent: Vec<[Tensor<2>; 2]> = rows.iter().filter_map(|row| row.recurrent.clone()).collect();
        if !recurrent.is_empty() {
            let all = |n: usize| Tensor::cat(recurrent.iter().map(|row| row[n].clone()).collect(), 0);
            joined.recurrent = Some([all(0), all(1)]);
        }
        for (n, row) in rows.into_iter().enumerate() {
            let (held, places) = (row.held(), end - start);
            let put = |all: Option<Tensor<4>>, of_row: Option<Tensor<4>>| {
                let of_row = last(of_row?, held, places);
                let all = all.unwrap_or_else(|| place_for(count, places, &of_row));
                Some(put_last(all, n..n + 1, of_row, places))
            };
            joined.keys = put(joined.keys.take(), row.keys);
            joined.values = put(joined.values.take(), row.values);
        }
        joined
    }

    /// Forgets all rows but these.
    pub(super) fn keep(&mut self, rows: &[usize], of: usize) {
        let numbers: Vec<i32> = rows.iter().map(|&row| row as i32).collect();
        let pick = |all: Tensor<4>| {
            let numbers = TensorData::new(numbers.clone(), [rows.len()]);
            let numbers = Tensor::<1, Int>::from_data(numbers, &all.device());
            all.select(0, numbers)
        };
        self.keys = self.keys.take().map(pick);
        self.values = self.values.take().map(pick);
        let pick = |all: Tensor<2>| {
            let [count, width] = all.dims();
            let each = count / of;
            Tensor::cat(rows.iter().map(|row| all.clone().narrow(0, row * each, each)).collect(), 0)
                .reshape([rows.len() * each, width])
        };
        self.recurrent = self.recurrent.take().map(|both| both.map(pick));
    }

    /// These rows, of which there are `count`, and one more as number `at`. All end before `end`, which
    /// is at least the length of each.
    pub(super) fn with(self, row: LayerCache, [at, count]: [usize; 2], end: usize) -> LayerCache {
        let start = self.reach.first(0, end);
        let (places, [held, new]) = (end - start, [self.held(), row.held()]);
        let put = |all: Option<Tensor<4>>, one: Option<Tensor<4>>| {
            let (all, one) = (last(all?, held, places), last(one?, new, places));
            let mut place = place_for(count + 1, places, &one);
            for (rows, first) in [(0..at, 0), (at..count, at + 1)] {
                if !rows.is_empty() {
                    let some = all.clone().narrow(0, rows.start, rows.len());
                    place = put_last(place, first..first + rows.len(), some, places);
                }
            }
            Some(put_last(place, at..at + 1, one, places))
        };
        let among = |all: Tensor<2>, one: Tensor<2>| {
            // Each row has as many rows of the matrix as the new one.
            let (each, all_rows) = (one.dims()[0], count * one.dims()[0]);
            let part = |rows: Range<usize>| (!rows.is_empty()).then(|| all.clone().narrow(0, rows.start, rows.len()));
            let parts = [part(0..at * each), Some(one), part(at * each..all_rows)];
            Tensor::cat(parts.into_iter().flatten().collect(), 0)
        };
        LayerCache {
            keys: put(self.keys, row.keys),
            values: put(self.values, row.values),
            start,
            length: end,
            reach: self.reach,
            recurrent: self.recurrent.zip(row.recurrent).map(|([inputs, states], [new_inputs, new_states])| {
                [among(inputs, new_inputs), among(states, new_states)]
            }),
            apart: Vec::new(),
        }
    }

    /// Moves all rows, so that they end before place `end`. None is longer.
    pub(super) fn shrink(&mut self, end: usize) {
        self.move_to(self.reach.first(0, end), end);
    }

    /// Moves all rows, so that they end before place `end`, into rooms for the places from `start` on.
    fn move_to(&mut self, start: usize, end: usize) {
        let (held, places) = (self.held(), end - start);
        let move_all = |all: Tensor<4>| {
            let kept = last(all, held, places);
            let rows = kept.dims()[0];
            put_last(place_for(rows, places, &kept), 0..rows, kept, places)
        };
        self.keys = self.keys.take().map(move_all);
        self.values = self.values.take().map(move_all);
        (self.start, self.length) = (start, end);
    }

    /// Bytes of its tensors.
    pub(super) fn bytes(&self) -> usize {
        let of = |tensor: &Tensor<4>| tensor.dims().iter().product::<usize>() * tensor.dtype().size();
        let of_state = |tensor: &Tensor<2>| tensor.dims().iter().product::<usize>() * tensor.dtype().size();
        let kept: usize = self.keys.iter().chain(&self.values).map(of).sum();
        kept + self.recurrent.iter().flatten().map(of_state).sum::<usize>()
    }

    /// The last inputs of the convolution and the states of a gated delta net.
    pub(crate) fn recurrent(&self) -> Option<&[Tensor<2>; 2]> {
        self.recurrent.as_ref()
    }

    /// As [`LayerCache::recurrent`], behind more tokens.
    pub(crate) fn set_recurrent(&mut self, both: [Tensor<2>; 2]) {
        self.recurrent = Some(both);
    }

    /// The room of each row once it holds so many places.
    pub(super) fn room_for(&self, places: usize) -> usize {
        let now = self.keys.as_ref().map_or(0, |keys| keys.dims()[1]);
        if places <= now { now } else { room(places) }
    }

    /// Adds keys and values [rows · t, k, d] of t new tokens for each row; the row is the only one
    /// as long as the cache is empty. Returns all, [rows · room, k, d], with the unused room of a
    /// row behind its tokens.
    ///
    /// Rows that are apart have any number of tokens each. Theirs come back one row behind the other, without room.
    pub(crate) fn extend(&mut self, keys: Tensor<3>, values: Tensor<3>) -> (Tensor<3>, Tensor<3>) {
        if !self.apart.is_empty() {
            return self.extend_apart(&keys, &values);
        }
        let (places, room) = self.next_places(&keys);
        let values = put(self.values.take(), values, places, room);
        self.values = Some(values.clone());
        (self.extend_shared(keys), flat(values))
    }

    fn extend_apart(&mut self, keys: &Tensor<3>, values: &Tensor<3>) -> (Tensor<3>, Tensor<3>) {
        let (mut start, mut all) = (0, (Vec::new(), Vec::new()));
        for (row, count) in &mut self.apart {
            let own = |all: &Tensor<3>| all.clone().narrow(0, start, *count);
            let (keys, values) = row.extend(own(keys), own(values));
            all.0.push(keys.narrow(0, 0, row.held()));
            all.1.push(values.narrow(0, 0, row.held()));
            start += *count;
        }
        (Tensor::cat(all.0, 0), Tensor::cat(all.1, 0))
    }

    /// As [`LayerCache::extend`], of what is keys and values in one: the short vectors of latent attention.
    pub(crate) fn extend_shared(&mut self, keys: Tensor<3>) -> Tensor<3> {
        let (places, room) = self.next_places(&keys);
        let keys = put(self.keys.take(), keys, places, room);
        self.keys = Some(keys.clone());
        self.length = self.start + places[1];
        flat(keys)
    }

    /// The places of new keys [rows · t, k, d] among those that are held, and the room of each row with them.
    fn next_places(&self, new: &Tensor<3>) -> ([usize; 2], usize) {
        let (held, end) = (self.held(), self.held() + new.dims()[0] / self.rows());
        ([held, end], self.room_for(end))
    }

    fn rows(&self) -> usize {
        self.keys.as_ref().map_or(1, |keys| keys.dims()[0])
    }
}

/// New tokens [rows · t, k, d] at places from `start` to before `end`, behind the old ones [rows, room, k, d].
/// If those have too little room, they move to one of `room` places.
fn put(old: Option<Tensor<4>>, new: Tensor<3>, [start, end]: [usize; 2], room: usize) -> Tensor<4> {
    let [all, heads, width] = new.dims();
    let rows = all / (end - start);
    let new = new.reshape([rows, end - start, heads, width]);
    let place = match old {
        Some(old) if end <= old.dims()[1] => old,
        old => {
            let place = empty([rows, room, heads, width], &new);
            match old {
                Some(old) => place.slice_assign([0..rows, 0..start], old.narrow(1, 0, start)),
                None => place,
            }
        }
    };
    place.slice_assign([0..rows, start..end], new)
}

/// The last `held` places of rows that hold so many, at most `places` of them:
/// all [rows, room, k, d] -> [rows, .., k, d].
fn last(all: Tensor<4>, held: usize, places: usize) -> Tensor<4> {
    let kept = held.min(places);
    all.narrow(1, held - kept, kept)
}

/// A tensor for so many rows with so many places each, and one for the next token. Places that
/// nothing is put to are not looked at.
fn place_for(rows: usize, places: usize, like: &Tensor<4>) -> Tensor<4> {
    let [_, _, heads, width] = like.dims();
    empty([rows, room(places + 1), heads, width], like)
}

/// Puts what some rows hold to the end of their `places` places.
fn put_last(all: Tensor<4>, rows: Range<usize>, held: Tensor<4>, places: usize) -> Tensor<4> {
    let first = places - held.dims()[1];
    all.slice_assign([rows, first..places], held)
}

fn flat(all: Tensor<4>) -> Tensor<3> {
    let [rows, room, heads, width] = all.dims();
    all.reshape([rows * room, heads, width])
}

/// Zeros of the number type of `like`, on its device.
fn empty(shape: [usize; 4], like: &Tensor<4>) -> Tensor<4> {
    Tensor::zeros(shape, (&like.device(), like.dtype()))
}

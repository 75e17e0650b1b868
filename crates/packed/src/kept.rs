//! How much of a change is left once a matrix is packed again.

/// The part of a change that is left, added up over matrices.
///
/// It is the projection of what is there on what was wanted: of `after - before` on
/// `merged - before`. 1 is all of it. A step of 4 bits is larger than most changes, so there it is
/// often 0.1 to 0.2.
#[derive(Clone, Copy, Debug, Default)]
pub struct Kept {
    /// (after - before) · (merged - before)
    found: f64,
    /// (merged - before) · (merged - before)
    wanted: f64,
}

impl Kept {
    /// Adds a matrix: as the base had it, decoded; with the change; with the change, packed and
    /// decoded.
    ///
    /// # Panics
    /// If the three are not of the same length.
    pub fn add(&mut self, before: &[f32], merged: &[f32], after: &[f32]) {
        assert!(before.len() == merged.len() && merged.len() == after.len(), "matrices of one shape");
        for ((before, merged), after) in before.iter().zip(merged).zip(after) {
            let before = f64::from(*before);
            let wanted = f64::from(*merged) - before;
            self.found += (f64::from(*after) - before) * wanted;
            self.wanted += wanted * wanted;
        }
    }

    /// The part that is left. `None`: nothing was changed.
    pub fn share(&self) -> Option<f64> {
        (self.wanted > 0.0).then(|| self.found / self.wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_part_that_is_left() {
        let cases = [
            ([1.0, 2.0], [1.5, 2.5], [1.5, 2.5], Some(1.0)),
            ([1.0, 2.0], [1.5, 2.5], [1.0, 2.0], Some(0.0)),
            ([1.0, 2.0], [1.5, 2.5], [1.5, 2.0], Some(0.5)),
            ([1.0, 2.0], [1.5, 2.5], [2.0, 3.0], Some(2.0)),
            ([1.0, 2.0], [1.0, 2.0], [1.5, 2.0], None),
        ];
        for (before, merged, after, share) in cases {
            let mut kept = Kept::default();
            kept.add(&before, &merged, &after);
            assert_eq!(kept.share(), share, "{before:?} {merged:?} {after:?}");
        }
    }
}

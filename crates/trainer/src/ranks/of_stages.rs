//! What ranks that hold the layers of a model together tell each other, as each has a part of what is trained, and
//! with whom they add it up.

use finetune_allreduce::{Group, GroupError};
use finetune_model::{Spread, Stage};

use super::Ranks;
use crate::error::TrainError;

impl Ranks {
    /// Connects the ranks that hold the same layers, each of another model, if there are several. All ranks call it
    /// together.
    ///
    /// # Errors
    /// If one cannot be reached.
    pub(super) fn connect_same_layers(&self, stage: &Stage) -> Result<(), TrainError> {
        if self.replicas() > 1 {
            let group = self.group.split(stage.mine as u64, self.group.rank() as u64)?;
            let _ = self.same_layers.set(group);
        }
        Ok(())
    }

    /// The ranks that hold the same layers: all, unless several hold a model together. They are counted as the models
    /// are. `None` if this is the only one.
    pub(super) fn with_same_layers(&self) -> Option<&Group> {
        match self.stages() {
            1 => Some(&self.group).filter(|group| group.world() > 1),
            _ => self.same_layers.get(),
        }
    }

    /// The sums of squares of all parameters, in their order, from those of this rank's parameters.
    ///
    /// # Errors
    /// If the group fails.
    pub(crate) fn squares_of_all(&self, spread: &Spread, own: Vec<f64>) -> Result<Vec<f64>, GroupError> {
        let stages = self.stages();
        if stages == 1 {
            return Ok(own);
        }
        let count_of = |stage: usize| spread.held().iter().filter(|held| held.process == stage).count();
        let most = (0..stages).map(count_of).max().unwrap_or(0);
        let mut block = own;
        block.resize(most, 0.0);
        let all = self.gather(&block)?;
        // All models have the same ones.
        let mut of_stages: Vec<_> = (0..stages).map(|stage| all[stage * most..][..most].iter().copied()).collect();
        Ok(spread.held().iter().filter_map(|held| of_stages[held.process].next()).collect())
    }

    /// Whether something is so on any of the ranks that hold a model together. Ranks that hold all of it find the
    /// same.
    ///
    /// # Errors
    /// If the group fails.
    pub(crate) fn of_any_stage(&self, mine: bool) -> Result<bool, GroupError> {
        if self.stages() == 1 { Ok(mine) } else { Ok(self.largest(i32::from(mine))? > 0) }
    }

    /// What rank 0 says, for ranks that hold a model together; any other rank has nothing to do with it.
    ///
    /// # Errors
    /// If the group fails.
    pub(crate) fn as_first_says(&self, mine: bool) -> Result<bool, GroupError> {
        if self.stages() == 1 {
            return Ok(mine);
        }
        let mut said = [u8::from(mine)];
        self.group.broadcast(&mut said, 0)?;
        Ok(said[0] > 0)
    }

    /// As [`Ranks::expect_same`], of what ranks have that hold the same layers.
    pub(crate) fn expect_same_layers(&self, contents: &[(&'static str, blake3::Hash)]) -> Result<(), TrainError> {
        self.expect_same_as(contents, &|rank| rank % self.stages())
    }
}

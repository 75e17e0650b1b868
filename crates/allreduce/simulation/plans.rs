//! Plans with planted bugs. A plan is data, so the code that makes plans needs no hooks for them.

use std::ops::Range;

use crate::mutations::{Bug, Mutations};
use crate::plan::Plan;

/// Changes a plan as the code would make it with those bugs.
pub(super) fn plant(mutations: Mutations, plan: &mut Plan) {
    for channel in &mut plan.channels {
        if mutations.has(Bug::ArrivalOrderSum) {
            channel.receives.iter_mut().for_each(|frame| frame.after = None);
        }
        if mutations.has(Bug::SentBeforeReduced) {
            channel.sends.iter_mut().for_each(|frame| frame.after = None);
        }
        if mutations.has(Bug::ChunkOffByOne) {
            shorten(channel.sends.iter_mut().map(|frame| &mut frame.at).collect());
            shorten(channel.receives.iter_mut().map(|frame| &mut frame.at).collect());
        }
    }
}

/// Takes the last element off each run of frames that lie one after the other. Both ends of a link
/// have the same runs.
fn shorten(mut frames: Vec<&mut Range<usize>>) {
    for index in 0..frames.len() {
        let ends_run = frames.get(index + 1).is_none_or(|next| next.start != frames[index].end);
        if ends_run && frames[index].len() > 1 {
            frames[index].end -= 1;
        }
    }
}

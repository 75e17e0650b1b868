//! The first rank's thread that computes, where other ranks hold parts of the models: before each step it tells them what
//! is new.

use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use finetune_model::{Engine, EngineCounts, EngineSettings, Model};

use crate::computing::{Submitted, Told};
use crate::others::{Order, Orders, Others};

/// How often an idle server looks whether the other ranks are there.
const LOOK: Duration = Duration::from_secs(1);

/// How many such looks it is before the ranks use their connections, which must not rest for long.
const LOOKS: u64 = 240;

/// Computes until the other end of the channel is gone, and tells the other ranks what is done.
///
/// # Errors
/// What has happened, if one is lost.
pub(crate) fn lead(
    settings: EngineSettings,
    requests: &Receiver<Told>,
    shown: &Mutex<EngineCounts>,
    others: &Others,
) -> Result<(), String> {
    others.begin(settings)?;
    let models = Numbered::new(&others.models);
    let mut leading = Leading { engine: Engine::new(settings), others, models, orders: Orders::default() };
    let mut looks = 0u64;
    loop {
        if leading.engine.is_idle() {
            match requests.recv_timeout(LOOK) {
                Ok(told) => leading.take(told),
                Err(RecvTimeoutError::Timeout) => {
                    (others.check)()?;
                    looks += 1;
                    if looks.is_multiple_of(LOOKS) {
                        others.rest()?;
                    }
                    if !leading.models.has_unheld() {
                        continue;
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return leading.end(),
            }
        }
        loop {
            match requests.try_recv() {
                Ok(told) => leading.take(told),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return leading.end(),
            }
        }
        leading.step()?;
        *shown.lock().unwrap_or_else(PoisonError::into_inner) = leading.engine.counts();
    }
}

struct Leading<'a> {
    engine: Engine,
    others: &'a Others,
    models: Numbered,
    /// What the others are told before the next step.
    orders: Orders,
}

impl Leading<'_> {
    fn take(&mut self, told: Told) {
        match told {
            Told::Requests(all) => all.into_iter().for_each(|submitted| self.submit(submitted)),
            Told::Form(model, text, number) => {
                let model = self.models.number(&model);
                self.orders.forms.extend(model.map(|model| (model, text.to_string(), number)));
            }
            Told::Load(load) => self.orders.loads.push(load),
            Told::Loaded(number, model) => self.models.add(number, model),
            Told::GiveBack(number) => self.orders.unloads.push(number),
            Told::Unload(model) => self.models.unload(&model),
        }
    }

    fn submit(&mut self, Submitted { request, listener, grammar }: Submitted) {
        // All that can be named are known. The listener of another one would tell its client.
        let Some(model) = self.models.number(&request.model) else { return };
        let order = Order::of(&request, model, grammar.as_deref());
        if self.engine.submit(request, listener).is_ok() {
            self.orders.requests.push(order);
        }
    }

    fn step(&mut self) -> Result<(), String> {
        let mut orders = std::mem::take(&mut self.orders);
        for (number, model) in self.models.take_unheld() {
            self.engine.forget(&model);
            orders.unloads.push(number);
        }
        orders.gone = self.engine.gone();
        orders.has_step = true;
        self.others.tell(&orders)?;
        self.engine.step_without(&orders.gone);
        (self.others.check)()?;
        // The group may not know yet what a connection has come to.
        self.engine.lost().map_or(Ok(()), |what| Err(what.to_owned()))
    }

    /// Tells the others to end, and takes with them what is under way: what the last rank has chosen has to go somewhere.
    fn end(&mut self) -> Result<(), String> {
        self.others.end()?;
        self.engine.drain();
        Ok(())
    }
}

/// The models that all ranks have, each with its number.
struct Numbered<M = Model> {
    all: Vec<(u64, Arc<M>)>,
    /// The numbers of those that were unloaded. Requests that have named one before go on, and all ranks keep it for them.
    unloaded: Vec<u64>,
}

impl<M> Numbered<M> {
    fn new(models: &[Arc<M>]) -> Numbered<M> {
        Numbered { all: (0..).zip(models.iter().cloned()).collect(), unloaded: Vec::new() }
    }

    fn number(&self, model: &Arc<M>) -> Option<u64> {
        self.all.iter().find(|(_, other)| Arc::ptr_eq(other, model)).map(|(number, _)| *number)
    }

    fn add(&mut self, number: u64, model: Arc<M>) {
        self.all.push((number, model));
    }

    fn unload(&mut self, model: &Arc<M>) {
        self.unloaded.extend(self.number(model));
    }

    /// Whether an unloaded one is of no use to anybody any more: nobody else holds it, so nobody can ask for it again.
    fn is_unheld(&self, (number, model): &(u64, Arc<M>)) -> bool {
        self.unloaded.contains(number) && Arc::strong_count(model) == 1
    }

    fn has_unheld(&self) -> bool {
        self.all.iter().any(|known| self.is_unheld(known))
    }

    /// Takes out the unloaded ones that nobody else holds.
    fn take_unheld(&mut self) -> Vec<(u64, Arc<M>)> {
        if self.unloaded.is_empty() {
            return Vec::new();
        }
        let (unheld, held): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.all).into_iter().partition(|known| self.is_unheld(known));
        self.all = held;
        let is_known = |number: &u64| self.all.iter().any(|(known, _)| known == number);
        self.unloaded.retain(is_known);
        unheld
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A model that was unloaded keeps its number as long as a request may name it. Its number is not given again.
    #[test]
    fn an_unloaded_model_goes_once_nobody_holds_it() {
        let at_start = Arc::new('b');
        let mut models = Numbered::new(std::slice::from_ref(&at_start));
        let (first, second) = (Arc::new('x'), Arc::new('y'));
        models.add(4, Arc::clone(&first));
        models.add(7, Arc::clone(&second));
        assert_eq!([&at_start, &first, &second].map(|model| models.number(model)), [Some(0), Some(4), Some(7)]);
        models.unload(&first);
        assert!(!models.has_unheld() && models.take_unheld().is_empty(), "an answer goes on with it");
        assert_eq!(models.number(&first), Some(4));
        drop((first, second));
        assert!(models.has_unheld());
        assert_eq!(models.take_unheld(), [(4, Arc::new('x'))], "nobody has unloaded the other one");
        assert!(!models.has_unheld() && models.take_unheld().is_empty());
        assert_eq!(models.all.iter().map(|(number, _)| *number).collect::<Vec<_>>(), [0, 7]);
    }
}

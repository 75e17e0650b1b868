//! The thread that computes. Requests come to it through a channel, and it waits for nobody:
//! listeners only put what they hear into channels without bounds, of which each holds one answer.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use std::{io, thread};

use finetune_model::{Engine, EngineCounts, EngineRequest, EngineSettings, Listener, Model};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::elsewhere::{Elsewhere, Expected};
use crate::error::ApiError;
use crate::others::{Orders, Others};

/// Bytes of the thread's stack, as the main thread has them.
const STACK: usize = 8 << 20;

/// How often an idle server looks whether the other ranks are there.
const LOOK: Duration = Duration::from_secs(1);

/// How many such looks it is before the ranks use their connections, which must not rest for long.
const LOOKS: u64 = 240;

/// A request, and who hears of it.
pub(crate) struct Submitted {
    pub(crate) request: EngineRequest,
    pub(crate) listener: Box<dyn Listener>,
    /// The grammar of its form, for other ranks.
    pub(crate) grammar: Option<Arc<str>>,
}

/// What the thread is told.
enum Told {
    Requests(Vec<Submitted>),
    /// The text of a form that a request of this model will have, for other ranks, and its number.
    Form(Arc<Model>, Arc<str>, u64),
}

/// A handle of the thread.
pub(crate) struct Computing {
    /// `None` once no more requests are taken.
    requests: Mutex<Option<Sender<Told>>>,
    /// The forms that other ranks read, if some hold parts of the models.
    elsewhere: Option<Arc<Elsewhere>>,
    settings: EngineSettings,
    /// One for each request that may run or wait. A listener holds it until it is dropped.
    places: Arc<Semaphore>,
    counts: Arc<Mutex<EngineCounts>>,
}

impl Computing {
    /// Starts the thread. `ended` is called if it ends by a panic.
    /// `others`: the ranks that hold parts of the models too. If one is lost, `ended` is told what has happened.
    pub(crate) fn start(
        settings: EngineSettings,
        others: Option<Others>,
        ended: impl FnOnce(Option<String>) + Send + 'static,
    ) -> Result<Computing, io::Error> {
        let (sender, receiver) = channel();
        let counts: Arc<Mutex<EngineCounts>> = Arc::default();
        let shown = Arc::clone(&counts);
        let of = |others: &Others| Elsewhere::new(Arc::clone(&others.have_read), others.world.saturating_sub(1));
        let elsewhere = others.as_ref().map(of);
        let thread = thread::Builder::new().name("computing".to_owned()).stack_size(STACK);
        thread.spawn(move || {
            let work = || match &others {
                None => {
                    compute(Engine::new(settings), &receiver, &shown);
                    Ok(())
                }
                Some(others) => compute_together(Engine::new(settings), settings, &receiver, &shown, others),
            };
            match catch_unwind(AssertUnwindSafe(work)) {
                Ok(Ok(())) => {}
                Ok(Err(lost)) => ended(Some(lost)),
                Err(_) => ended(None),
            }
        })?;
        let places = Arc::new(Semaphore::new(settings.slots + settings.queue));
        Ok(Computing { requests: Mutex::new(Some(sender)), elsewhere, settings, places, counts })
    }

    pub(crate) fn settings(&self) -> EngineSettings {
        self.settings
    }

    /// A place among the requests that run or wait.
    pub(crate) fn place(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        Arc::clone(&self.places).try_acquire_owned().map_err(|_| ApiError::busy())
    }

    /// Hands requests over, which were checked. Their listeners are dropped if the thread has ended.
    pub(crate) fn submit(&self, all: Vec<Submitted>) {
        self.tell(Told::Requests(all));
    }

    /// A form is about to be read. Other ranks begin to read it, too: what is returned waits for them, if there are some.
    pub(crate) fn announce(&self, model: &Arc<Model>, form: &Arc<str>) -> Option<Expected> {
        let expected = self.elsewhere.as_ref()?.expect();
        self.tell(Told::Form(Arc::clone(model), Arc::clone(form), expected.number()));
        Some(expected)
    }

    fn tell(&self, told: Told) {
        if let Some(requests) = &*self.requests.lock().unwrap_or_else(PoisonError::into_inner) {
            // A listener that is dropped tells its client.
            let _ = requests.send(told);
        }
    }

    /// Waits until no request runs or waits.
    pub(crate) async fn drained(&self) {
        let all = u32::try_from(self.settings.slots + self.settings.queue).unwrap_or(u32::MAX);
        let _ = self.places.acquire_many(all).await;
    }

    /// Ends all requests after the current step. Their listeners are dropped.
    pub(crate) fn end(&self) {
        *self.requests.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(crate) fn counts(&self) -> EngineCounts {
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Computes until the other end of the channel is gone.
fn compute(mut engine: Engine, requests: &Receiver<Told>, shown: &Mutex<EngineCounts>) {
    loop {
        if engine.is_idle() {
            let Ok(told) = requests.recv() else { return };
            take(&mut engine, told);
        }
        loop {
            match requests.try_recv() {
                Ok(told) => take(&mut engine, told),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return,
            }
        }
        engine.step();
        *shown.lock().unwrap_or_else(PoisonError::into_inner) = engine.counts();
    }
}

/// The same, and tells the other ranks what is done.
fn compute_together(
    mut engine: Engine,
    settings: EngineSettings,
    requests: &Receiver<Told>,
    shown: &Mutex<EngineCounts>,
    others: &Others,
) -> Result<(), String> {
    others.begin(settings)?;
    let mut looks = 0u64;
    loop {
        let mut orders = Orders { has_step: true, ..Orders::default() };
        let mut order = |engine: &mut Engine, told: Told| {
            let all = match told {
                Told::Requests(all) => all,
                Told::Form(model, text, number) => {
                    orders.forms.extend(others.number(&model).map(|model| (model, text.to_string(), number)));
                    return;
                }
            };
            for Submitted { request, listener, grammar } in all {
                let order = others.order(&request, grammar.as_deref());
                if engine.submit(request, listener).is_ok() {
                    orders.requests.push(order);
                }
            }
        };
        if engine.is_idle() {
            match requests.recv_timeout(LOOK) {
                Ok(told) => order(&mut engine, told),
                Err(RecvTimeoutError::Timeout) => {
                    (others.check)()?;
                    looks += 1;
                    if looks.is_multiple_of(LOOKS) {
                        others.rest()?;
                    }
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => return end_together(&mut engine, others),
            }
        }
        loop {
            match requests.try_recv() {
                Ok(told) => order(&mut engine, told),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return end_together(&mut engine, others),
            }
        }
        orders.gone = engine.gone();
        others.tell(&orders)?;
        engine.step_without(&orders.gone);
        (others.check)()?;
        // The group may not know yet what a connection has come to.
        engine.lost().map_or(Ok(()), |what| Err(what.to_owned()))?;
        *shown.lock().unwrap_or_else(PoisonError::into_inner) = engine.counts();
    }
}

/// Tells the others to end, and takes with them what is under way: what the last rank has chosen has to go somewhere.
fn end_together(engine: &mut Engine, others: &Others) -> Result<(), String> {
    others.end()?;
    engine.drain();
    Ok(())
}

fn take(engine: &mut Engine, told: Told) {
    let Told::Requests(all) = told else { return };
    for Submitted { request, listener, .. } in all {
        // It was checked, and it has a place, so it is not refused. If it were, its client would hear
        // that the listener is gone.
        let _ = engine.submit(request, listener);
    }
}

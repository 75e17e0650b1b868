//! The thread that computes. Requests come to it through a channel, and it waits for nobody:
//! listeners only put what they hear into channels without bounds, of which each holds one answer.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use std::{io, thread};

use finetune_model::{Engine, EngineCounts, EngineRequest, EngineSettings, Listener, Model};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::catalog::Served;
use crate::elsewhere::{Became, Elsewhere, Expected};
use crate::error::ApiError;
use crate::leading::lead;
use crate::others::{Load, Others};

/// Bytes of the thread's stack, as the main thread has them.
const STACK: usize = 8 << 20;

/// A request, and who hears of it.
pub(crate) struct Submitted {
    pub(crate) request: EngineRequest,
    pub(crate) listener: Box<dyn Listener>,
    /// The grammar of its form, for other ranks.
    pub(crate) grammar: Option<Arc<str>>,
}

/// What the thread is told. All but requests is for other ranks.
pub(crate) enum Told {
    Requests(Vec<Submitted>),
    /// The text of a form that a request of this model will have, and its number.
    Form(Arc<Model>, Arc<str>, u64),
    /// An adapter that they load.
    Load(Load),
    /// All of them have this one, under its number: requests may name it.
    Loaded(u64, Arc<Model>),
    /// They give back the one of this number, which no request has named.
    GiveBack(u64),
    /// They drop this one once no request needs it any more.
    Unload(Arc<Model>),
}

/// A handle of the thread.
pub(crate) struct Computing {
    /// `None` once no more requests are taken.
    requests: Mutex<Option<Sender<Told>>>,
    /// What other ranks are asked for beside computing, if some hold parts of the models.
    elsewhere: Option<Arc<Elsewhere>>,
    settings: EngineSettings,
    /// One for each request that may run or wait. A listener holds it until it is dropped.
    places: Arc<Semaphore>,
    counts: Arc<Mutex<EngineCounts>>,
    /// The thread, where it has to tell other ranks of its end.
    telling: Mutex<Option<JoinHandle<()>>>,
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
        let of = |others: &Others| {
            let models = others.models.len() as u64;
            Elsewhere::new(Arc::clone(&others.heard), others.hosts.clone(), models)
        };
        let elsewhere = others.as_ref().map(of);
        let thread = thread::Builder::new().name("computing".to_owned()).stack_size(STACK);
        let thread = thread.spawn(move || {
            let work = || match &others {
                None => {
                    compute(Engine::new(settings), &receiver, &shown);
                    Ok(())
                }
                Some(others) => lead(settings, &receiver, &shown, others),
            };
            match catch_unwind(AssertUnwindSafe(work)) {
                Ok(Ok(())) => {}
                Ok(Err(lost)) => ended(Some(lost)),
                Err(_) => ended(None),
            }
        })?;
        let places = Arc::new(Semaphore::new(settings.slots + settings.queue));
        let telling = Mutex::new(elsewhere.is_some().then_some(thread));
        Ok(Computing { requests: Mutex::new(Some(sender)), elsewhere, settings, places, counts, telling })
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

    /// The other ranks load this adapter, too, if there are some: each from this path below its own directory. They
    /// give it back unless what is returned is kept.
    ///
    /// # Errors
    /// One of them cannot, takes longer than `longest`, or is lost.
    pub(crate) async fn load_elsewhere(
        &self,
        served: &Served,
        path: &Path,
        longest: Duration,
    ) -> Result<Option<Lent<'_>>, ApiError> {
        let Some(elsewhere) = &self.elsewhere else { return Ok(None) };
        let no_text = || ApiError::field("lora_path", format!("`{}` has bytes that are no text", path.display()));
        let path = path.to_str().ok_or_else(no_text)?.to_owned();
        let expected = elsewhere.expect();
        let lent = Lent { computing: self, number: expected.number(), is_kept: false };
        let (name, content) = (served.id.clone(), served.content.clone());
        self.tell(Told::Load(Load { number: lent.number, name, path, content }));
        match expected.wait(longest).await.map_err(|what| ApiError::lost(&what))? {
            Became::Done => Ok(Some(lent)),
            Became::Refused(rank, what) => Err(ApiError::field("lora_path", format!("{rank}: {what}"))),
            Became::Late(ranks) => Err(ApiError::not_loaded(&ranks, longest)),
        }
    }

    /// A model is named by no request any more. Those under way go on.
    pub(crate) fn unload(&self, model: Arc<Model>) {
        self.tell(Told::Unload(model));
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

    /// Waits until the other ranks are told of the end, if there are some: a process that ends before takes its
    /// connections with it, and the others take it for lost.
    pub(crate) fn told(&self) {
        let thread = self.telling.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // A panic was told by then.
            let _ = thread.join();
        }
    }

    pub(crate) fn counts(&self) -> EngineCounts {
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An adapter that all other ranks have loaded, or are loading.
pub(crate) struct Lent<'a> {
    computing: &'a Computing,
    number: u64,
    is_kept: bool,
}

impl Lent<'_> {
    /// Requests may name it, as this model.
    pub(crate) fn keep(mut self, model: Arc<Model>) {
        self.computing.tell(Told::Loaded(self.number, model));
        self.is_kept = true;
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        // Also if the client has left meanwhile.
        if !self.is_kept {
            self.computing.tell(Told::GiveBack(self.number));
        }
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

fn take(engine: &mut Engine, told: Told) {
    let Told::Requests(all) = told else { return };
    for Submitted { request, listener, .. } in all {
        // It was checked, and it has a place, so it is not refused. If it were, its client would hear
        // that the listener is gone.
        let _ = engine.submit(request, listener);
    }
}

//! The models of a rank that computes with the first one, by the numbers that the first rank gives them. Adapters are loaded
//! on a thread beside the one that computes, and the first rank names them in requests once all ranks have them.

use std::collections::BTreeMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::catalog::{Loader, Served};
use crate::following::Tell;
use crate::others::Load;

const IS_ANOTHER: &str = "the adapter there is not that of the first rank; copy it to all hosts";

/// The models. Those at the start have the first numbers, in their order.
pub(crate) struct Models {
    /// `None`: it is being loaded.
    all: Mutex<BTreeMap<u64, Option<Arc<Served>>>>,
}

impl Models {
    pub(crate) fn new(served: Vec<Served>) -> Models {
        let all = (0..).zip(served.into_iter().map(|served| Some(Arc::new(served)))).collect();
        Models { all: Mutex::new(all) }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Option<Arc<Served>>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn get(&self, number: u64) -> Option<Arc<Served>> {
        self.lock().get(&number).cloned().flatten()
    }

    /// Takes out a model, or one that is being loaded.
    pub(crate) fn remove(&self, number: u64) -> Option<Arc<Served>> {
        self.lock().remove(&number).flatten()
    }

    fn is_wanted(&self, number: u64) -> bool {
        self.lock().contains_key(&number)
    }

    /// A model that was loaded, unless it was given back meanwhile.
    fn put(&self, number: u64, served: Served) {
        if let Some(place) = self.lock().get_mut(&number) {
            *place = Some(Arc::new(served));
        }
    }
}

/// The thread that loads adapters, one after the other. Nobody waits for its end: a disk may not answer.
pub(crate) struct Loading {
    models: Arc<Models>,
    asked: Sender<Load>,
}

impl Loading {
    pub(crate) fn start(models: Arc<Models>, loader: Loader, tell: Tell) -> Result<Loading, io::Error> {
        let (asked, receiver) = channel();
        let own = Arc::clone(&models);
        thread::Builder::new().name("loading".to_owned()).spawn(move || load_all(&own, &loader, &tell, &receiver))?;
        Ok(Loading { models, asked })
    }

    /// Loads an adapter once its turn has come, and tells the first rank.
    pub(crate) fn ask(&self, load: Load) {
        self.models.lock().insert(load.number, None);
        // The thread ends with this.
        let _ = self.asked.send(load);
    }
}

fn load_all(models: &Models, loader: &Loader, tell: &Tell, asked: &Receiver<Load>) {
    for Load { number, name, path, content } in asked {
        // It may have been given back before its turn.
        if !models.is_wanted(number) {
            continue;
        }
        let loaded = catch_unwind(AssertUnwindSafe(|| loader(&name, Path::new(&path))));
        match loaded.unwrap_or_else(|_| Err("it could not be read, which is a bug".to_owned())) {
            Ok(served) if served.content != content => tell(number, Some(&format!("{path}: {IS_ANOTHER}"))),
            Ok(served) => {
                models.put(number, served);
                tell(number, None);
            }
            Err(what) => tell(number, Some(&what)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(60);

    /// (the number, what is wrong)
    type Said = Arc<Mutex<Vec<(u64, Option<String>)>>>;

    fn load(number: u64, path: &str) -> Load {
        Load { number, name: "x".to_owned(), path: path.to_owned(), content: None }
    }

    fn wait_for(said: &Said, count: usize) -> Vec<(u64, Option<String>)> {
        let began = Instant::now();
        while said.lock().expect("no panic").len() < count {
            assert!(began.elapsed() < DEADLINE, "{said:?}");
            thread::sleep(Duration::from_millis(1));
        }
        said.lock().expect("no panic").clone()
    }

    /// The first rank hears of each adapter what is wrong with it, also if the loader fails by a panic. One that was given
    /// back before its turn is not read.
    #[test]
    fn the_first_rank_hears_why_an_adapter_is_not_there() {
        let (said, is_held) = (Said::default(), Arc::new(Mutex::new(())));
        let heard = Arc::clone(&said);
        let tell: Tell = Arc::new(move |number: u64, what: Option<&str>| {
            heard.lock().expect("no panic").push((number, what.map(str::to_owned)));
        });
        let door = Arc::clone(&is_held);
        let loader: Loader = Box::new(move |_, path| {
            drop(door.lock().expect("no panic"));
            assert_ne!(path, Path::new("broken"), "this loader fails");
            Err(format!("there is no {}", path.display()))
        });
        let models = Arc::new(Models::new(Vec::new()));
        let loading = Loading::start(Arc::clone(&models), loader, tell).expect("a thread");
        let held = is_held.lock().expect("no panic");
        loading.ask(load(3, "a"));
        loading.ask(load(4, "b"));
        loading.ask(load(5, "broken"));
        loading.ask(load(6, "c"));
        assert!(models.remove(4).is_none() && models.get(3).is_none(), "none is loaded yet");
        drop(held);
        let bug = "it could not be read, which is a bug";
        let want = [(3, "there is no a"), (5, bug), (6, "there is no c")];
        assert_eq!(wait_for(&said, 3), want.map(|(number, what)| (number, Some(what.to_owned()))));
        assert!((3..7).all(|number| models.get(number).is_none()));
    }
}

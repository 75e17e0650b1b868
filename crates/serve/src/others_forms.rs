//! The forms that the first rank asks for, on the ranks that compute with it. They are read on a thread beside the one
//! that computes, from when the first rank begins to read them on. It hears of each that is read, and lets a request
//! begin once all ranks have its form (`elsewhere.rs`).

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Scope;
use std::time::Duration;

use finetune_model::Form;

use crate::grammar::Grammar;
use crate::others_models::Models;

/// Forms that are kept, and that wait to be read. The first rank reads one at a time, so there are more of them only where
/// this rank is slower.
const MOST_KEPT: usize = 32;
/// How long an answer waits for a form that was forgotten since it was read: as long as the first rank reads one.
const LONGEST: Duration = Duration::from_secs(20);

/// A form that is being read, or was.
#[derive(Default)]
struct Place {
    read: Mutex<Option<Result<Grammar, String>>>,
    is_read: Condvar,
}

impl Place {
    fn lock(&self) -> MutexGuard<'_, Option<Result<Grammar, String>>> {
        self.read.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, grammar: Result<Grammar, String>) {
        *self.lock() = Some(grammar);
        self.is_read.notify_all();
    }

    fn begin(&self) -> Result<Box<dyn Form>, String> {
        let waited = self.is_read.wait_timeout_while(self.lock(), LONGEST, |read| read.is_none());
        match &*waited.unwrap_or_else(PoisonError::into_inner).0 {
            Some(Ok(grammar)) => Ok(grammar.begin()),
            Some(Err(what)) => Err(what.clone()),
            None => Err(format!("the form is not read within {} seconds", LONGEST.as_secs())),
        }
    }
}

struct Kept {
    /// The number of its model.
    model: u64,
    text: String,
    place: Arc<Place>,
}

/// What the thread that reads is asked for.
struct Asked {
    model: u64,
    text: String,
    place: Arc<Place>,
    /// What the first rank is told once it is read, if it waits for it.
    number: Option<u64>,
}

/// The forms of a rank that computes with the first one.
pub(crate) struct Forms<'scope> {
    kept: VecDeque<Kept>,
    reader: SyncSender<Asked>,
    has_read: &'scope (dyn Fn(u64) + Sync),
    /// No form is begun any more.
    has_ended: Arc<AtomicBool>,
}

impl<'scope> Forms<'scope> {
    /// Starts the thread that reads. It ends with the forms, after the one that it is reading. `has_read`: tells the
    /// first rank the number of a form that is read.
    pub(crate) fn start(
        scope: &'scope Scope<'scope, '_>,
        models: &'scope Models,
        has_read: &'scope (dyn Fn(u64) + Sync),
    ) -> Forms<'scope> {
        let (reader, asked) = sync_channel(MOST_KEPT);
        let has_ended = Arc::<AtomicBool>::default();
        let ended = Arc::clone(&has_ended);
        scope.spawn(move || read_all(models, &asked, has_read, &ended));
        Forms { kept: VecDeque::new(), reader, has_read, has_ended }
    }

    /// Begins to read a form, if it is not known. The first rank is told this number once it is read.
    pub(crate) fn announce(&mut self, model: u64, text: String, number: u64) {
        self.ask(model, text, Some(number));
    }

    /// A form that this rank does not need.
    pub(crate) fn skip(&self, number: u64) {
        (self.has_read)(number);
    }

    /// Forgets the forms of a model that is unloaded.
    pub(crate) fn forget(&mut self, model: u64) {
        self.kept.retain(|kept| kept.model != model);
    }

    /// The form of an answer.
    pub(crate) fn of(&mut self, model: u64, text: String) -> Box<dyn Form> {
        let known = self.kept.iter().find(|kept| kept.model == model && kept.text == text);
        let place = known.map(|kept| Arc::clone(&kept.place));
        Box::new(Late { place: place.unwrap_or_else(|| self.ask(model, text, None)), form: None })
    }

    fn ask(&mut self, model: u64, text: String, number: Option<u64>) -> Arc<Place> {
        let known = self.kept.iter().find(|kept| kept.model == model && kept.text == text);
        let (place, is_new) = known.map_or_else(|| (Arc::default(), true), |kept| (Arc::clone(&kept.place), false));
        // A known one may still be read: the thread tells of it behind that.
        let asked = Asked { model, text: text.clone(), place: Arc::clone(&place), number };
        match self.reader.try_send(asked) {
            Ok(()) if is_new => {
                if self.kept.len() == MOST_KEPT {
                    self.kept.pop_front();
                }
                self.kept.push_back(Kept { model, text, place: Arc::clone(&place) });
            }
            Ok(()) => {}
            Err(TrySendError::Full(Asked { number, .. }) | TrySendError::Disconnected(Asked { number, .. })) => {
                if is_new {
                    place.put(Err(format!("{MOST_KEPT} forms wait to be read already")));
                }
                // The answer hears what is wrong.
                number.into_iter().for_each(|number| self.skip(number));
            }
        }
        place
    }
}

impl Drop for Forms<'_> {
    fn drop(&mut self) {
        self.has_ended.store(true, Ordering::Relaxed);
    }
}

fn read_all(models: &Models, asked: &Receiver<Asked>, has_read: &(dyn Fn(u64) + Sync), has_ended: &AtomicBool) {
    for Asked { model, text, place, number } in asked {
        // What still waits then is for nobody.
        if has_ended.load(Ordering::Relaxed) {
            return;
        }
        if place.lock().is_none() {
            let served = models.get(model).ok_or_else(|| "the first rank has other models".to_owned());
            place.put(served.and_then(|served| served.grammars()?.read(&text)));
        }
        number.into_iter().for_each(has_read);
    }
}

/// The form of an answer. It is there before the answer begins, unless it was forgotten.
struct Late {
    place: Arc<Place>,
    form: Option<Box<dyn Form>>,
}

impl Late {
    fn form(&mut self) -> Result<&mut Box<dyn Form>, String> {
        if self.form.is_none() {
            self.form = Some(self.place.begin()?);
        }
        self.form.as_mut().ok_or_else(String::new)
    }
}

impl Form for Late {
    fn allowed(&mut self) -> Result<&[u32], String> {
        self.form()?.allowed()
    }

    fn take(&mut self, token: u32) -> Result<(), String> {
        self.form()?.take(token)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::forms::tests::tokenizer;
    use crate::forms::{Thought, grammar};
    use crate::grammar::Grammars;

    fn text(schema: &serde_json::Value) -> String {
        grammar(Some(schema), None, Thought::Not).expect("a grammar")
    }

    /// Whoever asks for the next token before the form is read waits for it, and nobody else does.
    #[test]
    fn an_answer_waits_for_its_form() {
        let place = Arc::<Place>::default();
        let mut late = Late { place: Arc::clone(&place), form: None };
        let grammars = Grammars::of(&tokenizer(), &[0], &[]).expect("a vocabulary of bytes");
        let read = grammars.read(&text(&json!({"enum": [7]}))).expect("a grammar");
        let want = read.begin().allowed().expect("something comes").to_vec();
        let waiting = std::thread::spawn(move || late.allowed().map(<[u32]>::to_vec));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!waiting.is_finished(), "it is not read yet");
        place.put(Ok(read));
        assert_eq!(waiting.join().expect("no panic"), Ok(want));
        place.put(Err("too large".to_owned()));
        let mut late = Late { place, form: None };
        assert_eq!(late.allowed().map(<[u32]>::len), Err("too large".to_owned()));
    }

    /// What was announced is read once, however many answers have it, and only so many are kept. Of each the first rank
    /// hears once it is there.
    #[test]
    fn forms_are_read_once_and_have_a_bound() {
        let said = Mutex::new(Vec::new());
        let has_read = |number: u64| said.lock().expect("no panic").push(number);
        let numbers = 0..MOST_KEPT as u64 + 5;
        let models = Models::new(Vec::new());
        std::thread::scope(|scope| {
            let mut forms = Forms::start(scope, &models, &has_read);
            for n in numbers.clone() {
                let text = text(&json!({"enum": [n]}));
                forms.announce(0, text.clone(), n);
                // The one before is told, too.
                let mut form = forms.of(0, text.clone());
                assert!(form.allowed().is_err_and(|what| what.contains("other models")), "no model has this number");
                let place = |forms: &Forms<'_>| Arc::as_ptr(&forms.kept.back().expect("it is kept").place);
                let first = place(&forms);
                forms.announce(0, text, 100 + n);
                assert_eq!(first, place(&forms), "{n}");
                assert!(forms.kept.len() <= MOST_KEPT);
                forms.forget(1);
                assert_eq!(first, place(&forms), "another model's is kept");
                while !said.lock().expect("no panic").contains(&(100 + n)) {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            forms.skip(77);
            forms.forget(0);
            assert!(forms.kept.is_empty());
        });
        let want: Vec<u64> = numbers.flat_map(|n| [n, 100 + n]).chain([77]).collect();
        assert_eq!(said.into_inner().expect("no panic"), want);
    }

    /// While one form is read, others wait for it up to a bound. Those beyond it, and those that wait at the end, are not
    /// read.
    #[test]
    fn forms_that_wait_have_a_bound_and_end() {
        let (said, is_held) = (Mutex::new(Vec::new()), Mutex::new(()));
        let has_read = |number: u64| {
            if number == 0 {
                drop(is_held.lock().expect("no panic"));
            }
            said.lock().expect("no panic").push(number);
        };
        let most = MOST_KEPT as u64;
        let models = Models::new(Vec::new());
        std::thread::scope(|scope| {
            let mut forms = Forms::start(scope, &models, &has_read);
            let held = is_held.lock().expect("no panic");
            forms.announce(0, "0".to_owned(), 0);
            // The thread is with the first one.
            while forms.kept[0].place.lock().is_none() {
                std::thread::sleep(Duration::from_millis(1));
            }
            for n in 1..=most + 3 {
                forms.announce(0, n.to_string(), n);
            }
            let refused: Vec<u64> = said.lock().expect("no panic").clone();
            assert_eq!(refused, [most + 1, most + 2, most + 3], "at once: nobody waits for them");
            drop(forms);
            drop(held);
        });
        let said = said.into_inner().expect("no panic");
        assert_eq!(said.last(), Some(&0), "none of those that waited was read: {said:?}");
    }
}

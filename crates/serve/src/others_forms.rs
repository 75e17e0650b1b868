//! The forms that the first rank asks for, on the ranks that compute with it. They are read on a thread beside the one
//! that computes, from when the first rank begins to read them on, so that answers under way do not wait for a slow one.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Scope;
use std::time::Duration;

use finetune_model::Form;

use crate::catalog::Served;
use crate::grammar::Grammar;

/// Forms that are kept. The first rank reads one at a time, and answers of those before it may not have begun.
const MOST_KEPT: usize = 32;
/// How long the first token of an answer waits for its form: as long as the first rank waits for it.
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
    /// The model, by its number among those that are served.
    model: usize,
    text: String,
    place: Arc<Place>,
}

/// The forms of a rank that computes with the first one.
pub(crate) struct Forms {
    kept: VecDeque<Kept>,
    reader: Sender<(usize, String, Arc<Place>)>,
}

impl Forms {
    /// Starts the thread that reads. It ends with the forms.
    pub(crate) fn start<'scope>(scope: &'scope Scope<'scope, '_>, served: &'scope [Served]) -> Forms {
        let (reader, asked) = channel();
        scope.spawn(move || read_all(served, &asked));
        Forms { kept: VecDeque::new(), reader }
    }

    /// Begins to read a form that is not known.
    pub(crate) fn announce(&mut self, model: usize, text: String) -> Box<dyn Form> {
        let known = self.kept.iter().find(|kept| kept.model == model && kept.text == text);
        if let Some(Kept { place, .. }) = known {
            return Box::new(Late { place: Arc::clone(place), form: None });
        }
        let place = Arc::<Place>::default();
        // A reader that is gone leaves the place empty, and the answer hears so.
        let _ = self.reader.send((model, text.clone(), Arc::clone(&place)));
        if self.kept.len() == MOST_KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back(Kept { model, text, place: Arc::clone(&place) });
        Box::new(Late { place, form: None })
    }
}

fn read_all(served: &[Served], asked: &Receiver<(usize, String, Arc<Place>)>) {
    for (model, text, place) in asked {
        let served = served.get(model).ok_or_else(|| "the first rank has other models".to_owned());
        place.put(served.and_then(|served| served.grammars()?.read(&text)));
    }
}

/// The form of an answer that waits for it before its first token, if it is not there by then.
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
        let grammars = Grammars::new(&tokenizer(), &[0], &[]).expect("a vocabulary of bytes");
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

    /// What was announced is read once, however many answers have it, and only so many are kept.
    #[test]
    fn forms_are_read_once_and_have_a_bound() {
        std::thread::scope(|scope| {
            let mut forms = Forms::start(scope, &[]);
            for n in 0..MOST_KEPT + 5 {
                let text = text(&json!({"enum": [n]}));
                let first = Arc::as_ptr(&forms.kept_place(&text));
                assert_eq!(first, Arc::as_ptr(&forms.kept_place(&text)), "{n}");
                assert!(forms.kept.len() <= MOST_KEPT);
            }
            // No model has this number.
            let mut form = forms.announce(3, text(&json!({"enum": [1]})));
            assert!(form.allowed().is_err_and(|what| what.contains("other models")));
        });
    }

    impl Forms {
        fn kept_place(&mut self, text: &str) -> Arc<Place> {
            drop(self.announce(0, text.to_owned()));
            Arc::clone(&self.kept.back().expect("it is kept").place)
        }
    }
}

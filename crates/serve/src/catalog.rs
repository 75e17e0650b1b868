//! The models that requests can name: a base and its adapters.

use std::path::Path;
use std::sync::{Arc, Once, OnceLock, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use finetune_dataset::ChatTokenizer;
use finetune_model::Model;
use serde_json::{Value, json};

use crate::call_form::CallForm;
use crate::error::ApiError;
use crate::grammar::Grammars;
use crate::harmony;
use crate::marking::Marking;

/// A model that requests can name.
pub struct Served {
    pub(crate) id: String,
    /// The base, if it is an adapter.
    parent: Option<String>,
    pub(crate) model: Arc<Model>,
    pub(crate) tokenizer: ChatTokenizer,
    /// The tokens that end an answer.
    pub(crate) ends: Vec<u32>,
    /// What requests get that do not say.
    pub(crate) temperature: f64,
    pub(crate) top_p: f64,
    created: u64,
    /// A hash of its adapter, where ranks have to have the same one.
    pub(crate) content: Option<String>,
    /// How its chat template marks what answers consist of.
    pub(crate) marking: Marking,
    /// Made when they are first asked for.
    grammars: OnceLock<Result<Arc<Grammars>, String>>,
    call_form: OnceLock<Option<CallForm>>,
    /// That calls of tools with `strict` stay text is said once.
    pub(crate) says_unheld: Once,
}

impl Served {
    /// A model under the name `id`. `parent`: the name of the base, of a model with an adapter.
    /// `(temperature, top_p)`: what requests get that do not say.
    pub fn new(
        id: String,
        parent: Option<String>,
        model: Model,
        tokenizer: ChatTokenizer,
        (temperature, top_p): (f64, f64),
    ) -> Served {
        let mut ends = tokenizer.eos_ids().to_vec();
        // A template that is put on a base model has an end that the model's files do not know.
        ends.extend(tokenizer.template_end().filter(|end| !ends.contains(end)));
        let marking = Marking::of(&tokenizer);
        if marking.is_harmony() {
            // A call ends an answer, too, and the end of a message does not: the next one follows.
            let message_end = tokenizer.token_to_id(harmony::END);
            ends.retain(|end| Some(*end) != message_end);
            let last = harmony::LAST.iter().filter_map(|mark| tokenizer.token_to_id(mark));
            ends.extend(last.filter(|end| !ends.contains(end)).collect::<Vec<_>>());
        }
        Served {
            id,
            parent,
            model: Arc::new(model),
            tokenizer,
            ends,
            temperature,
            top_p,
            created: now(),
            content: None,
            marking,
            grammars: OnceLock::new(),
            call_form: OnceLock::new(),
            says_unheld: Once::new(),
        }
    }

    /// With a hash of its adapter: ranks that load one while they serve compare theirs with that of the first rank.
    pub fn of_content(self, content: String) -> Served {
        Served { content: Some(content), ..self }
    }

    /// What makes grammars over its tokens. The first call for these tokens takes a second for a vocabulary of 150,000.
    ///
    /// # Errors
    /// A sentence that says why there is none.
    pub(crate) fn grammars(&self) -> Result<&Grammars, String> {
        let new = || {
            let form = self.call_form().filter(|_| !self.marking.is_harmony());
            let marks = form.map(|form| form.marks(self.marking.formats())).unwrap_or_default();
            Grammars::of(&self.tokenizer, &self.ends, &marks)
        };
        self.grammars.get_or_init(new).as_deref().map_err(Clone::clone)
    }

    /// How its chat template writes calls of tools, if that is a form that can be kept.
    pub(crate) fn call_form(&self) -> Option<&CallForm> {
        self.call_form.get_or_init(|| CallForm::of(&self.tokenizer, self.marking.formats())).as_ref()
    }

    /// The model.
    pub fn model(&self) -> Arc<Model> {
        Arc::clone(&self.model)
    }

    fn object(&self) -> Value {
        json!({
            "id": self.id,
            "object": "model",
            "created": self.created,
            "owned_by": "finetune",
            "root": self.parent.as_deref().unwrap_or(&self.id),
            "parent": self.parent,
            "max_model_len": self.model.config.max_position_embeddings,
        })
    }
}

/// Reads an adapter while the server runs: its name and its path below the directory of adapters become a model, or a
/// sentence that says what is wrong.
pub type Loader = Box<dyn Fn(&str, &Path) -> Result<Served, String> + Send + Sync>;

/// Gets lines that whoever runs the server should see.
pub type Say = Box<dyn Fn(&str) + Send + Sync>;

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The error for a name that none of these models has.
fn not_there(id: &str, all: &[Arc<Served>]) -> ApiError {
    let there: Vec<String> = all.iter().map(|served| served.id.clone()).collect();
    ApiError::no_model(id, &there)
}

/// The models, the default first.
pub(crate) struct Catalog {
    all: RwLock<Vec<Arc<Served>>>,
    /// How many of the first ones were there when the server was started. They stay.
    at_start: usize,
}

impl Catalog {
    pub(crate) fn new(served: Vec<Served>) -> Catalog {
        let at_start = served.len();
        Catalog { all: RwLock::new(served.into_iter().map(Arc::new).collect()), at_start }
    }

    fn all(&self) -> Vec<Arc<Served>> {
        self.all.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn has(&self, id: &str) -> bool {
        self.all().iter().any(|served| served.id == id)
    }

    /// The model of a request. Without a name it is the default.
    pub(crate) fn find(&self, id: Option<&str>) -> Result<Arc<Served>, ApiError> {
        let all = self.all();
        let found = all.iter().find(|served| id.is_none_or(|id| served.id == id));
        found.cloned().ok_or_else(|| not_there(id.unwrap_or_default(), &all))
    }

    /// How many models there are.
    pub(crate) fn count(&self) -> usize {
        self.all.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Adds an adapter. False: the name is taken.
    pub(crate) fn add(&self, served: Served) -> bool {
        let mut all = self.all.write().unwrap_or_else(PoisonError::into_inner);
        let is_new = all.iter().all(|other| other.id != served.id);
        if is_new {
            all.push(Arc::new(served));
        }
        is_new
    }

    /// Takes out an adapter that was loaded while the server runs. Answers that are under way go on.
    ///
    /// # Errors
    /// It was there from the start, or is not there: somebody else may have taken it out just now.
    pub(crate) fn remove(&self, id: &str) -> Result<Arc<Served>, ApiError> {
        let mut all = self.all.write().unwrap_or_else(PoisonError::into_inner);
        match all.iter().position(|served| served.id == id) {
            Some(place) if place < self.at_start => {
                let stays = "was named when the server was started, and stays: only what was loaded is unloaded";
                Err(ApiError::field("lora_name", format!("`{id}` {stays}")))
            }
            Some(place) => Ok(all.remove(place)),
            None => Err(not_there(id, &all)),
        }
    }

    /// The answer of `/v1/models`.
    pub(crate) fn object(&self) -> Value {
        let all: Vec<Value> = self.all().iter().map(|served| served.object()).collect();
        json!({"object": "list", "data": all})
    }

    /// The answer of `/v1/models/ID`.
    pub(crate) fn one(&self, id: &str) -> Result<Value, ApiError> {
        Ok(self.find(Some(id))?.object())
    }
}

//! The base that a server has in memory, and the adapters on it.

use std::path::{Path, PathBuf};

use finetune_dataset::ChatTokenizer;
use finetune_serve::{Loader, Served};
use finetune_store::failpoint;
use finetune_trainer::Together;

use super::base_id;
use crate::cli::ServeArguments;
use crate::commands::answering::tokenizer;
use crate::commands::chat::recommended;
use crate::commands::opening::{self, Opened, Purpose};
use crate::failure::Failure;
use crate::source::{Source, adapter_directory};

/// The base, and what adapters need of it.
pub(super) struct Base {
    pub(super) id: String,
    directory: PathBuf,
    pub(super) opened: Opened,
    tokenizer: ChatTokenizer,
    chat_template: Option<PathBuf>,
    force: bool,
}

impl Base {
    /// Loads the base, which is also the first model that is served.
    pub(super) fn open(
        arguments: &ServeArguments,
        source: &Source,
        adapters: &[(String, PathBuf)],
        together: Option<&Together>,
        say: &dyn Fn(&str),
    ) -> Result<(Base, Vec<Served>), Failure> {
        // Without its adapter.
        let own = Source::of(source.model.clone(), None, arguments.chat_template.clone(), Vec::new())?;
        let tokenizer = tokenizer(&own)?;
        tokenizer.notices().iter().for_each(|notice| say(notice));
        let first = adapters
            .first()
            .map(|(_, directory)| opening::read_adapter(directory, &source.model, arguments.force, &|_| {}));
        let first = first.transpose()?;
        let opened =
            opening::open_base(&source.model, &arguments.model(), Purpose::Text, first.as_ref(), together, say)?;
        let base = Base {
            id: base_id(&source.model),
            directory: source.model.clone(),
            opened,
            tokenizer: tokenizer.clone(),
            chat_template: arguments.chat_template.clone(),
            force: arguments.force,
        };
        let served = Served::new(base.id.clone(), None, base.opened.model.clone(), tokenizer, recommended(&own));
        Ok((base, vec![served]))
    }

    /// An adapter on the base. Both share the weights of the base.
    pub(super) fn with_adapter(&self, name: &str, directory: &Path, say: &dyn Fn(&str)) -> Result<Served, Failure> {
        let adapter = opening::read_adapter(directory, &self.directory, self.force, say)?;
        let mut model = self.opened.model.clone();
        model.attach(&adapter)?;
        let source =
            Source::of(self.directory.clone(), Some(directory.to_owned()), self.chat_template.clone(), Vec::new())?;
        // The base has one, so there is one.
        let tokenizer = source.tokenizer_beside(&self.tokenizer)?.unwrap_or_else(|| self.tokenizer.clone());
        let is_shared = model.placement().stage().is_some() || model.placement().slice().is_some();
        let served = Served::new(name.to_owned(), Some(self.id.clone()), model, tokenizer, recommended(&source));
        Ok(if is_shared { served.of_content(adapter.content()) } else { served })
    }

    /// What loads adapters that clients name while the server runs, from below the directory that the arguments say.
    pub(super) fn loader(self, arguments: &ServeArguments, say: impl Fn(&str) + Send + Sync + 'static) -> Loader {
        let below = arguments.adapters_dir.clone();
        Box::new(move |name: &str, path: &Path| self.load(name, path, below.as_deref(), &say))
    }

    /// An adapter that a client names while the server runs: `path` is that of a directory below `below`, where symbolic
    /// links lead to. What is wrong is a sentence.
    fn load(&self, name: &str, path: &Path, below: Option<&Path>, say: &dyn Fn(&str)) -> Result<Served, String> {
        failpoint::hit("adapter.load");
        let below = below.ok_or("the server was started without --adapters-dir")?;
        let path = below.join(path);
        // On another host it may be missing.
        if !path.is_dir() {
            return Err(format!("{}: there is no such directory; copy the adapter to all hosts", path.display()));
        }
        let mut notices = Vec::new();
        let directory = adapter_directory(&path, &mut notices).map_err(|failure| failure.fact())?;
        let is_below = || Some(directory.canonicalize().ok()?.starts_with(below.canonicalize().ok()?));
        if is_below() != Some(true) {
            return Err(format!("the adapter of {} lies elsewhere", path.display()));
        }
        notices.iter().for_each(|notice| say(notice));
        let served = self.with_adapter(name, &directory, say).map_err(|failure| failure.fact())?;
        say(&format!("the adapter {name} is loaded from {}", directory.display()));
        Ok(served)
    }
}

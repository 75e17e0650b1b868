//! The tokenizer's files of a model that is a GGUF file. They exist in memory only:
//! `x.gguf/tokenizer.json` is made of the metadata of `x.gguf`. If a directory has one GGUF model and
//! no other weights, its own files come first, whether the directory or the GGUF file was named.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use finetune_gguf::{FileSet, GgufError};

use crate::error::DatasetError;
use crate::guard::{self, Bounds, Foreign};
use crate::llama_cpp::read::Texts;
use crate::text_source::{GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG};

/// Bounds of making the files. A vocabulary of 256,000 pieces takes 3 s.
const MAKING: Bounds = Bounds { time: Duration::from_secs(60), bytes: 4 << 30 };

/// What tells that a file has not changed.
type Stamp = (PathBuf, u64, Option<SystemTime>);

/// The texts that were made last: they are asked for again and again.
static LAST: Mutex<Option<(Stamp, Arc<Option<Texts>>)>> = Mutex::new(None);

/// The bytes of a file that a GGUF file stands in for. `None`: it has none, or there is such a file.
///
/// # Errors
/// [`DatasetError::GgufTokenizer`], and [`DatasetError::Unreadable`].
pub(crate) fn in_place_of(path: &Path) -> Result<Option<Vec<u8>>, DatasetError> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name().and_then(OsStr::to_str)) else {
        return Ok(None);
    };
    if ![TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG].contains(&name) || path.exists() {
        return Ok(None);
    }
    let Some(file) = file_of(directory) else { return Ok(None) };
    let texts = texts(&file)?;
    let Some(texts) = texts.as_ref() else { return Ok(None) };
    Ok(Some(match name {
        TOKENIZER => texts.tokenizer.clone().map_err(|what| DatasetError::GgufTokenizer { path: file, what })?,
        TOKENIZER_CONFIG => texts.config.clone(),
        _ => texts.generation.clone(),
    }))
}

/// The file that `x.gguf/tokenizer.json` and the like mean if such a file lies beside the only GGUF
/// model of a directory. `None`: the path means itself.
pub(crate) fn beside(path: &Path) -> Option<PathBuf> {
    let file = path.parent().filter(|file| file.is_file())?;
    let directory = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let own = directory.join(path.file_name()?);
    let is_only = || file_of(directory).is_some_and(|only| only.file_name() == file.file_name());
    (own.is_file() && is_only()).then_some(own)
}

/// Whether there is a file at a path, or a GGUF file stands in for it.
pub(crate) fn is_there(path: &Path) -> bool {
    // What is wrong with a GGUF file is said when it is read.
    path.is_file() || beside(path).is_some() || in_place_of(path).map_or(true, |bytes| bytes.is_some())
}

/// Compares the tokens of a directory's own tokenizer.json with those of its GGUF file, which the
/// model was trained with. Nothing is compared if there is only one of them.
///
/// # Errors
/// [`DatasetError::GgufTokenizer`] if a token differs.
pub(crate) fn check(model: &Path, token: impl Fn(u32) -> Option<String>) -> Result<(), DatasetError> {
    let path = model.join(TOKENIZER);
    let own = if path.is_file() { Some(path) } else { beside(&path) };
    let Some((own, file)) = own.zip(file_of(model)) else { return Ok(()) };
    let texts = texts(&file)?;
    let tokens = texts.as_ref().as_ref().map_or(&[][..], |texts| &texts.tokens);
    // The spelling of spaces in added tokens differs between the two.
    let plain = |text: &str| text.replace('\u{2581}', " ");
    for (id, theirs) in tokens.iter().enumerate().filter_map(|(id, text)| Some((id, text.as_ref()?))) {
        let ours = token(id as u32);
        if ours.as_deref().map(plain) != Some(plain(theirs)) {
            let ours = ours.map_or("has no such token".to_owned(), |text| format!("has {text:?} there"));
            let what = format!("token {id} is {theirs:?}, and {} {ours}", own.display());
            return Err(DatasetError::GgufTokenizer { path: file, what });
        }
    }
    Ok(())
}

/// The GGUF file that a path is, or that a directory without other weights holds.
fn file_of(path: &Path) -> Option<PathBuf> {
    if path.is_file() {
        let mut magic = [0; 4];
        let is_gguf = File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok() && magic == *b"GGUF";
        return is_gguf.then(|| path.to_owned());
    }
    let has = |name: &str| path.join(name).is_file();
    if !path.is_dir() || has("model.safetensors") || has("model.safetensors.index.json") {
        return None;
    }
    match FileSet::in_directory(path).ok()?.as_slice() {
        [only] => Some(only.clone()),
        _ => None,
    }
}

/// The texts of a GGUF file. `None`: it has no tokenizer.
fn texts(file: &Path) -> Result<Arc<Option<Texts>>, DatasetError> {
    let about = file.metadata().map_err(|source| DatasetError::Unreadable { path: file.to_owned(), source })?;
    let stamp = (file.to_owned(), about.len(), about.modified().ok());
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((known, texts)) = last.as_ref()
        && *known == stamp
    {
        return Ok(texts.clone());
    }
    let path = file.to_owned();
    let made = guard::watched(&Foreign::Tokenizer(file.display().to_string()), MAKING, move || {
        let wrong = |what: String| DatasetError::GgufTokenizer { path: path.clone(), what };
        let files = FileSet::open(&path).map_err(|error| match error {
            GgufError::Unreadable { path, source } => DatasetError::Unreadable { path, source },
            // The error of the model's reader has the path in its message, too.
            GgufError::Malformed { path, what } => DatasetError::BadModelFile { path, reason: what },
            GgufError::Impossible { what } => wrong(what),
            GgufError::Store(error) => wrong(error.to_string()),
        })?;
        Texts::read(&files).map_err(wrong)
    })??;
    let texts = Arc::new(made);
    *last = Some((stamp, texts.clone()));
    Ok(texts)
}

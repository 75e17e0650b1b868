//! Adapters that are loaded and unloaded while the server runs, as vLLM does:
//! `POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State as Shared;
use axum::http::StatusCode;
use serde_json::{Value, json};

use crate::error::ApiError;
use crate::fields::Fields;
use crate::server::State;

/// Longest name of an adapter, in bytes.
const LONGEST_NAME: usize = 200;
/// Models that there may be at a time, each of which takes memory.
const MOST_MODELS: usize = 256;

pub(crate) async fn load(Shared(state): Shared<Arc<State>>, body: Bytes) -> Result<Json<Value>, ApiError> {
    let directory = allowed(&state)?;
    let fields = Fields::read(&body)?;
    let name = name(&fields)?;
    let Some(path) = fields.text("lora_path")?.filter(|path| !path.is_empty()) else {
        return Err(ApiError::field("lora_path", "`lora_path` is missing: a directory below --adapters-dir"));
    };
    let ready = state.ready()?;
    let taken = || ApiError::field("lora_name", format!("there is a model `{name}` already"));
    if ready.catalog.has(&name) {
        return Err(taken());
    }
    if ready.catalog.count() >= MOST_MODELS {
        let message = format!("there are {MOST_MODELS} models already: unload one first");
        return Err(ApiError::field("lora_name", message));
    }
    let path = below(&directory, Path::new(path))?;
    let (loading, id) = (Arc::clone(&state), name.clone());
    // Reading takes long, and one adapter at a time is enough.
    let place = state.loading.lock().await;
    let loaded = tokio::task::spawn_blocking(move || match &loading.ready() {
        Ok(ready) => (ready.loader)(&id, &path),
        Err(_) => Err("the model is loading".to_owned()),
    });
    let served = loaded.await.map_err(|_| ApiError::failed("the adapter could not be read, which is a bug"))?;
    let served = served.map_err(|reason| ApiError::field("lora_path", reason))?;
    drop(place);
    if !ready.catalog.add(served) {
        return Err(taken());
    }
    Ok(Json(json!({"status": "ok", "id": name})))
}

pub(crate) async fn unload(Shared(state): Shared<Arc<State>>, body: Bytes) -> Result<Json<Value>, ApiError> {
    allowed(&state)?;
    let name = name(&Fields::read(&body)?)?;
    let catalog = &state.ready()?.catalog;
    catalog.find(Some(&name))?;
    if !catalog.remove(&name) {
        let message =
            format!("`{name}` was named when the server was started, and stays: only what was loaded is unloaded");
        return Err(ApiError::field("lora_name", message));
    }
    Ok(Json(json!({"status": "ok", "id": name})))
}

/// The directory that adapters may be loaded from.
fn allowed(state: &State) -> Result<PathBuf, ApiError> {
    state.settings.adapters_dir.clone().ok_or_else(|| {
        let message = "the server was started without --adapters-dir, so no adapters are loaded while it runs";
        ApiError::new(StatusCode::FORBIDDEN, message)
    })
}

fn name(fields: &Fields) -> Result<String, ApiError> {
    let is_name = |name: &&str| (1..=LONGEST_NAME).contains(&name.len()) && !name.contains(char::is_control);
    match fields.text("lora_name")?.filter(is_name) {
        Some(name) => Ok(name.to_owned()),
        None => {
            let message = format!("`lora_name` must have 1 to {LONGEST_NAME} bytes, and no control characters");
            Err(ApiError::field("lora_name", message))
        }
    }
}

/// A directory below another one, where symbolic links lead to. A path that is not there and one
/// that is elsewhere are told apart by nobody.
fn below(directory: &Path, path: &Path) -> Result<PathBuf, ApiError> {
    let found = directory.canonicalize().and_then(|directory| {
        let found = directory.join(path).canonicalize()?;
        Ok((found.starts_with(&directory) && found != directory && found.is_dir()).then_some(found))
    });
    found.ok().flatten().ok_or_else(|| {
        let shown = path.display();
        ApiError::field("lora_path", format!("`{shown}` is no directory below --adapters-dir"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_lie_below_the_directory() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |path: &str| folder.path().join(path);
        for directory in ["adapters/a/inner", "elsewhere"] {
            std::fs::create_dir_all(at(directory)).expect("a directory");
        }
        let directory = at("adapters");
        #[cfg(unix)]
        std::os::unix::fs::symlink(at("elsewhere"), directory.join("link")).expect("a link");
        let is_below = |path: &str| below(&directory, Path::new(path)).is_ok();
        assert!(is_below("a") && is_below("a/inner") && is_below("a/../a"));
        assert!(is_below(&directory.join("a").to_string_lossy()), "whole paths are taken, too");
        for path in ["", ".", "..", "../elsewhere", "link", "nowhere", "/", &at("elsewhere").to_string_lossy()] {
            assert!(!is_below(path), "{path}");
        }
    }
}

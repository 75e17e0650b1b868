//! Adapters that are loaded and unloaded while the server runs, as vLLM does:
//! `POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State as Shared;
use axum::http::StatusCode;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::catalog::Catalog;
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
    let path = below(&directory, Path::new(path))?;
    // Reading takes long, and one adapter at a time is enough.
    let longest = state.settings.bounds.turn;
    let place = timeout(longest, Arc::clone(&state.loading).lock_owned()).await;
    let place = place.map_err(|_| ApiError::not_loaded("this server, as others were loaded", longest))?;
    expect_room(&ready.catalog, &name)?;
    let (loading, id, own) = (Arc::clone(&state), name.clone(), path.clone());
    // The place goes with it: behind a disk that does not answer hangs one thread, not one for each request.
    let loaded = tokio::task::spawn_blocking(move || match &loading.ready() {
        Ok(ready) => ((ready.loader)(&id, &own), place),
        Err(_) => (Err("the model is loading".to_owned()), place),
    });
    let loaded = timeout(longest, loaded).await.map_err(|_| ApiError::not_loaded("this server", longest))?;
    let (served, _place) = loaded.map_err(|_| ApiError::failed("the adapter could not be read, which is a bug"))?;
    let served = served.map_err(|reason| ApiError::field("lora_path", reason))?;
    // What is wrong here is told without the others.
    let lent = ready.computing.load_elsewhere(&served, &path, longest).await?;
    let model = served.model();
    // The thread that computes knows it before a request can name it.
    if let Some(lent) = lent {
        lent.keep(Arc::clone(&model));
    }
    if !ready.catalog.add(served) {
        ready.computing.unload(model);
        return Err(taken(&name));
    }
    Ok(Json(json!({"status": "ok", "id": name})))
}

/// Refuses a name that is taken, and more models than there may be.
fn expect_room(catalog: &Catalog, name: &str) -> Result<(), ApiError> {
    if catalog.has(name) {
        return Err(taken(name));
    }
    if catalog.count() >= MOST_MODELS {
        let message = format!("there are {MOST_MODELS} models already: unload one first");
        return Err(ApiError::field("lora_name", message));
    }
    Ok(())
}

fn taken(name: &str) -> ApiError {
    ApiError::field("lora_name", format!("there is a model `{name}` already"))
}

pub(crate) async fn unload(Shared(state): Shared<Arc<State>>, body: Bytes) -> Result<Json<Value>, ApiError> {
    allowed(&state)?;
    let name = name(&Fields::read(&body)?)?;
    let ready = state.ready()?;
    let served = ready.catalog.remove(&name)?;
    let model = served.model();
    drop(served);
    ready.computing.unload(model);
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

/// The path of a directory below another one, where symbolic links lead to: the same one on other hosts, whatever their
/// links. A path that is not there and one that is elsewhere are told apart by nobody.
fn below(directory: &Path, path: &Path) -> Result<PathBuf, ApiError> {
    let found = directory.canonicalize().and_then(|directory| {
        let found = directory.join(path).canonicalize()?;
        let below = found.strip_prefix(&directory).ok().filter(|below| *below != Path::new("") && found.is_dir());
        Ok(below.map(Path::to_owned))
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
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink("a/inner", directory.join("newest")).expect("a link");
            let found = below(&directory, Path::new("newest")).map_err(|error| error.object());
            assert_eq!(found, Ok(PathBuf::from("a/inner")), "another host may have another newest");
        }
        for path in ["", ".", "..", "../elsewhere", "link", "nowhere", "/", &at("elsewhere").to_string_lossy()] {
            assert!(!is_below(path), "{path}");
        }
    }
}

//! A server from its start to its end.

use std::io;
use std::net::{SocketAddr, TcpListener as StdListener, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{DefaultBodyLimit, Path, State as Shared};
use axum::http::{StatusCode, Uri, header};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{Router, get, post};
use finetune_model::EngineSettings;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{Mutex, Notify, Semaphore};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::adapters;
use crate::catalog::{Catalog, Loader, Say, Served};
use crate::chat::chat;
use crate::completions::completions;
use crate::computing::Computing;
use crate::connection::{Connection, Door};
use crate::door::{PIECE, enter};
use crate::error::{ApiError, ServeError};
use crate::metrics::Metrics;
use crate::others::{Check, Others};
use crate::page::page;
use crate::settings::Settings;

/// Threads for connections. Computing has its own.
const THREADS: usize = 2;
/// Texts that are rendered and read at a time. Each takes threads of its own.
const TEXTS: usize = 2;
/// Forms that are read at a time, beside texts.
const FORMS: usize = 1;
/// How long connections have to take the end of their answers.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What all requests share.
pub(crate) struct State {
    pub(crate) settings: Settings,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) texts: Arc<Semaphore>,
    pub(crate) forms: Arc<Semaphore>,
    /// One for each piece of the bodies of requests under way.
    pub(crate) bodies: Arc<Semaphore>,
    /// Held while an adapter is read.
    pub(crate) loading: Arc<Mutex<()>>,
    ready: OnceLock<Ready>,
    stopping: AtomicBool,
}

/// What there is once the model is loaded.
pub(crate) struct Ready {
    pub(crate) catalog: Catalog,
    pub(crate) computing: Computing,
    pub(crate) loader: Loader,
    pub(crate) say: Say,
    /// Whether the other ranks are there, if there are some.
    check: Option<Check>,
}

impl State {
    pub(crate) fn ready(&self) -> Result<&Ready, ApiError> {
        if self.is_stopping() {
            return Err(ApiError::stopping());
        }
        let ready = self.ready.get().ok_or_else(ApiError::loading)?;
        let lost = ready.check.as_ref().and_then(|check| check().err());
        lost.map_or(Ok(ready), |what| Err(ApiError::lost(&what)))
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }
}

enum Event {
    Stop,
    /// The thread that computes has ended by a panic.
    Broken,
    /// Another rank is lost, as this says.
    Lost(String),
}

/// Asks a server to stop, from any thread.
#[derive(Clone)]
pub struct Stopper(Sender<Event>);

impl Stopper {
    /// The server takes no more requests, and ends once those under way are answered.
    pub fn stop(&self) {
        // A server that is gone has stopped.
        let _ = self.0.send(Event::Stop);
    }
}

/// A server that listens.
pub struct Server {
    runtime: Runtime,
    state: Arc<State>,
    address: SocketAddr,
    events: Receiver<Event>,
    stopper: Stopper,
    closing: Arc<Notify>,
    connections: JoinHandle<()>,
}

impl Server {
    /// Listens. Until [`Server::ready`] requests hear that the model is loading.
    ///
    /// # Errors
    /// [`ServeError::Bind`], [`ServeError::Start`].
    pub fn start(settings: Settings) -> Result<Server, ServeError> {
        let listener = listen(&settings.host, settings.port)?;
        let runtime = Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("serving")
            .enable_all()
            .build()
            .map_err(ServeError::Start)?;
        let bounds = settings.bounds;
        let state = Arc::new(State {
            settings,
            metrics: Arc::default(),
            texts: Arc::new(Semaphore::new(TEXTS)),
            forms: Arc::new(Semaphore::new(FORMS)),
            bodies: Arc::new(Semaphore::new(bounds.bodies / PIECE)),
            loading: Arc::default(),
            ready: OnceLock::new(),
            stopping: AtomicBool::new(false),
        });
        let inside = runtime.enter();
        let listener = TcpListener::from_std(listener).map_err(ServeError::Start)?;
        drop(inside);
        let address = listener.local_addr().map_err(ServeError::Start)?;
        let closing = Arc::new(Notify::new());
        let closed = Arc::clone(&closing);
        let service = routes(Arc::clone(&state)).into_make_service_with_connect_info::<Connection>();
        let connections = runtime.spawn(async move {
            let serving = axum::serve(Door::new(listener, bounds), service);
            let closed = async move { closed.notified().await };
            // It ends when it is asked to.
            let _ = serving.with_graceful_shutdown(closed).await;
        });
        let (sender, events) = channel();
        Ok(Server { runtime, state, address, events, stopper: Stopper(sender), closing, connections })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What asks it to stop.
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// The models are loaded, the default first: requests are answered from now on. A second call
    /// does nothing. `others`: the ranks that hold layers of them too. `say` gets what whoever runs the server should see.
    ///
    /// # Errors
    /// [`ServeError::Start`].
    pub fn ready(
        &self,
        served: Vec<Served>,
        engine: EngineSettings,
        loader: Loader,
        others: Option<Others>,
        say: Say,
    ) -> Result<(), ServeError> {
        let events = self.stopper.0.clone();
        let ended = move |lost: Option<String>| {
            // A server that is gone needs no telling.
            let _ = events.send(lost.map_or(Event::Broken, Event::Lost));
        };
        let check = others.as_ref().map(|others| Arc::clone(&others.check));
        let computing = Computing::start(engine, others, ended).map_err(ServeError::Start)?;
        let _ = self.state.ready.set(Ready { catalog: Catalog::new(served), computing, loader, say, check });
        Ok(())
    }

    /// Serves until it is asked to stop. Requests under way may then go on for the grace time.
    ///
    /// # Errors
    /// [`ServeError::Computing`].
    pub fn wait(self) -> Result<(), ServeError> {
        // The stopper of the server itself keeps the channel open.
        let event = self.events.recv().unwrap_or(Event::Stop);
        self.state.stopping.store(true, Ordering::SeqCst);
        if let (Some(ready), Event::Stop) = (self.state.ready.get(), &event) {
            let grace = self.state.settings.grace;
            // The end of the grace time is no error.
            let _ = self.runtime.block_on(async { timeout(grace, ready.computing.drained()).await });
        }
        if let Some(ready) = self.state.ready.get() {
            ready.computing.end();
        }
        self.closing.notify_one();
        let connections = self.connections;
        let _ = self.runtime.block_on(async { timeout(LAST_WORDS, connections).await });
        if let Some(ready) = self.state.ready.get() {
            ready.computing.told();
        }
        self.runtime.shutdown_background();
        // What has ended the thread that computes counts, also if it came after the order to stop.
        match self.events.try_iter().find(|event| !matches!(event, Event::Stop)).unwrap_or(event) {
            Event::Stop => Ok(()),
            Event::Broken => Err(ServeError::Computing),
            Event::Lost(what) => Err(ServeError::Lost { what }),
        }
    }
}

fn listen(host: &str, port: u16) -> Result<StdListener, ServeError> {
    let failed = |source: io::Error| ServeError::Bind { host: host.to_owned(), port, source };
    let addresses: Vec<SocketAddr> = (bare(host), port).to_socket_addrs().map_err(failed)?.collect();
    let listener = StdListener::bind(&addresses[..]).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

/// A host without the brackets that an IPv6 address has in a URL: "[::1]".
fn bare(host: &str) -> &str {
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
}

fn routes(state: Arc<State>) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completions))
        .route("/v1/embeddings", post(embeddings))
        .route("/v1/responses", post(responses))
        .route("/v1/load_lora_adapter", post(adapters::load))
        .route("/v1/unload_lora_adapter", post(adapters::unload))
        .fallback(nothing)
        .method_not_allowed_fallback(other_method)
        // Bodies are read within their bounds by `enter`.
        .layer(DefaultBodyLimit::disable())
        .layer(from_fn_with_state(Arc::clone(&state), enter))
        .with_state(state)
}

async fn health(Shared(state): Shared<Arc<State>>) -> Result<Json<Value>, ApiError> {
    state.ready()?;
    Ok(Json(json!({"status": "ok"})))
}

async fn metrics(Shared(state): Shared<Arc<State>>) -> Response {
    let computing = state.ready.get().map(|ready| &ready.computing);
    let (counts, bounds) = (computing.map(Computing::counts), computing.map(Computing::settings));
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4")];
    (kind, state.metrics.text(counts.unwrap_or_default(), bounds)).into_response()
}

async fn models(Shared(state): Shared<Arc<State>>) -> Result<Json<Value>, ApiError> {
    Ok(Json(state.ready()?.catalog.object()))
}

async fn model(
    Shared(state): Shared<Arc<State>>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    let Path(id) = id.map_err(|refused| ApiError::new(refused.status(), refused.body_text()))?;
    Ok(Json(state.ready()?.catalog.one(&id)?))
}

async fn embeddings() -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, "`/v1/embeddings` is not supported: these models continue text")
}

async fn responses() -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, "`/v1/responses` is not supported: send `/v1/chat/completions` the messages")
}

async fn nothing(uri: Uri) -> ApiError {
    let hint = meant(uri.path()).map(|path| format!(": `{path}` is meant")).unwrap_or_default();
    ApiError::new(StatusCode::NOT_FOUND, format!("there is nothing at `{}`{hint}", uri.path()))
}

/// The path that a client means whose address of the server has no `/v1`, has it twice, or ends with a slash.
fn meant(path: &str) -> Option<&'static str> {
    const PATHS: [&str; 3] = ["/v1/chat/completions", "/v1/completions", "/v1/models"];
    let path = path.trim_end_matches('/');
    let path = path.trim_start_matches("/v1");
    PATHS.into_iter().find(|there| there.trim_start_matches("/v1") == path)
}

async fn other_method(uri: Uri) -> ApiError {
    let path = uri.path();
    let method = if matches!(path, "/v1/chat/completions" | "/v1/completions") { "POST" } else { "another method" };
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, format!("`{path}` takes {method}"))
}

#[cfg(test)]
mod tests {
    use super::{bare, meant};

    #[test]
    fn paths_that_are_nearly_right() {
        for (given, want) in [
            ("/chat/completions", Some("/v1/chat/completions")),
            ("/v1/v1/chat/completions", Some("/v1/chat/completions")),
            ("/v1/chat/completions/", Some("/v1/chat/completions")),
            ("/v1/models/", Some("/v1/models")),
            ("/completions", Some("/v1/completions")),
            ("/", None),
            ("/v1", None),
            ("/nowhere", None),
        ] {
            assert_eq!(meant(given), want, "{given}");
        }
    }

    #[test]
    fn an_address_may_stand_in_brackets() {
        for (given, meant) in [("[::1]", "::1"), ("::1", "::1"), ("127.0.0.1", "127.0.0.1"), ("[x", "[x")] {
            assert_eq!(bare(given), meant);
        }
    }
}

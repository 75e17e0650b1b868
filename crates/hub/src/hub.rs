//! The hub as the environment describes it: where it is, who asks, where files are kept.

use std::cell::OnceCell;
use std::path::{Path, PathBuf};
use std::time::Duration;

use finetune_store::{HubId, hub_cache};
use hf_hub::HFClient;
use tokio::runtime::Runtime;

use crate::error::HubError;
use crate::repository::{Kind, Repository};

/// The hub of everybody.
const ENDPOINT: &str = "https://huggingface.co";

/// How long is waited, and how often something is tried.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Longest time without a byte before a transfer or an answer is given up.
    pub silence: Duration,
    /// Pause before the second try. It doubles from try to try.
    pub pause: Duration,
    /// Tries without progress before something is given up.
    pub tries: u32,
    /// Longest time that the hub may ask to wait.
    pub longest_pause: Duration,
    /// Longest time that another process may hold a repository without fetching a byte.
    pub held: Duration,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience {
            silence: Duration::from_secs(30),
            pause: Duration::from_secs(1),
            tries: 5,
            longest_pause: Duration::from_secs(60),
            held: Duration::from_secs(120),
        }
    }
}

/// The hub, its cache here, and the token that is sent. No connection is made before one is needed.
pub struct Hub {
    pub(crate) cache: PathBuf,
    pub(crate) endpoint: String,
    pub(crate) patience: Patience,
    offline: bool,
    token: Option<String>,
    connection: OnceCell<Connection>,
}

/// The client of the hub, and the threads that its connections live on.
pub(crate) struct Connection {
    runtime: Runtime,
    pub(crate) client: HFClient,
}

impl Connection {
    pub(crate) fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }
}

impl Hub {
    /// The hub of the variables that Python's `huggingface_hub` reads: `HF_ENDPOINT`,
    /// `HF_HUB_OFFLINE`, `HF_TOKEN` (or the file that `hf auth login` writes), `HF_HUB_CACHE`,
    /// `HF_HOME`, `XDG_CACHE_HOME`, `HF_HUB_DOWNLOAD_TIMEOUT` (seconds).
    ///
    /// # Errors
    /// [`HubError::NoCache`] if neither they nor a home directory say where the cache is.
    pub fn from_environment() -> Result<Hub, HubError> {
        let variable = |name: &str| std::env::var(name).ok().filter(|text| !text.is_empty());
        let mut patience = Patience::default();
        if let Some(seconds) = variable("HF_HUB_DOWNLOAD_TIMEOUT").and_then(|text| text.parse::<f64>().ok())
            && let Ok(silence) = Duration::try_from_secs_f64(seconds)
            && !silence.is_zero()
        {
            patience.silence = silence;
        }
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        let offline = ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"].iter().any(|name| is_true(variable(name).as_deref()));
        let hub = Hub::new(hub_cache().ok_or(HubError::NoCache)?, &endpoint, token(&variable), patience);
        Ok(Hub { offline, ..hub })
    }

    /// A hub at an address, with a cache and a token of its own.
    pub fn new(cache: PathBuf, endpoint: &str, token: Option<String>, patience: Patience) -> Hub {
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        Hub { cache, endpoint, patience, offline: false, token, connection: OnceCell::new() }
    }

    /// The same hub without a network.
    pub fn offline(mut self) -> Hub {
        self.offline = true;
        self
    }

    /// Whether the network is forbidden.
    pub fn is_offline(&self) -> bool {
        self.offline
    }

    /// Where files are kept.
    pub fn cache(&self) -> &Path {
        &self.cache
    }

    /// Whether a token is sent.
    pub fn has_token(&self) -> bool {
        self.token.is_some()
    }

    /// The page of a repository, for people.
    pub fn page(&self, kind: Kind, id: &str) -> String {
        format!("{}/{}{id}", self.endpoint, kind.prefix())
    }

    /// The connection, made when it is first needed. `what` is wanted, and `fetch` are the
    /// arguments of a download of it.
    pub(crate) fn connection(&self, what: &str, fetch: &str) -> Result<&Connection, HubError> {
        if self.offline {
            let (what, fetch) = (what.to_owned(), fetch.to_owned());
            return Err(HubError::Offline { what, fetch });
        }
        if let Some(connection) = self.connection.get() {
            return Ok(connection);
        }
        let unusable = |what: String| HubError::Unreachable { endpoint: self.endpoint.clone(), what };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| unusable(error.to_string()))?;
        let mut builder = HFClient::builder()
            .endpoint(&self.endpoint)
            .cache_dir(&self.cache)
            .user_agent(concat!("finetune/", env!("CARGO_PKG_VERSION")))
            .retry_max_attempts(2)
            .retry_base_delay(self.patience.pause / 4);
        if let Some(token) = &self.token {
            builder = builder.token(token);
        }
        let client = builder.build().map_err(|error| HubError::Answer {
            id: self.endpoint.clone(),
            what: format!("no client can be made for it: {error}"),
        })?;
        Ok(self.connection.get_or_init(|| Connection { runtime, client }))
    }

    /// A repository at the other end.
    pub(crate) fn repository<'h>(&'h self, connection: &Connection, kind: Kind, id: &HubId) -> Repository<'h> {
        Repository::new(self, &connection.client, kind, &id.name)
    }
}

/// What `huggingface_hub` takes for yes.
fn is_true(text: Option<&str>) -> bool {
    text.is_some_and(|text| ["1", "ON", "YES", "TRUE"].contains(&text.to_ascii_uppercase().as_str()))
}

/// The token: of `HF_TOKEN`, of the file that `HF_TOKEN_PATH` names, or of `hf auth login`.
fn token(variable: &dyn Fn(&str) -> Option<String>) -> Option<String> {
    if is_true(variable("HF_HUB_DISABLE_IMPLICIT_TOKEN").as_deref()) {
        return None;
    }
    let clean = |text: String| Some(text.trim().to_owned()).filter(|text| !text.is_empty());
    if let Some(token) = variable("HF_TOKEN").and_then(clean) {
        return Some(token);
    }
    let home = variable("HOME").map(PathBuf::from);
    let path = |text: String| match (text.strip_prefix("~/"), &home) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => PathBuf::from(text),
    };
    let file = variable("HF_TOKEN_PATH")
        .map(path)
        .or_else(|| variable("HF_HOME").map(|text| path(text).join("token")))
        .or_else(|| variable("XDG_CACHE_HOME").map(|text| path(text).join("huggingface/token")))
        .or_else(|| home.as_ref().map(|home| home.join(".cache/huggingface/token")))?;
    std::fs::read_to_string(file).ok().and_then(clean)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (variables, the token)
    #[test]
    fn the_token_is_where_huggingface_hub_has_it() {
        let directory = tempfile::tempdir().expect("a directory");
        let home = directory.path().to_string_lossy().into_owned();
        for (name, text) in [("huggingface/token", "of-xdg\n"), ("token", "of-home\n"), ("mine", " of-path ")] {
            let path = directory.path().join(name);
            finetune_store::replace_file(&finetune_store::RealDisk, &path, text.as_bytes()).expect("a file");
        }
        let path = format!("{home}/mine");
        #[expect(clippy::type_complexity, reason = "a table of cases")]
        let cases: [(&[(&str, &str)], Option<&str>); 7] = [
            (&[("HF_TOKEN", " t "), ("HF_HOME", &home)], Some("t")),
            (&[("HF_TOKEN", " "), ("HF_HOME", &home)], Some("of-home")),
            (&[("HF_TOKEN_PATH", &path), ("HF_HOME", &home)], Some("of-path")),
            (&[("HOME", &home), ("HF_HOME", "~/")], Some("of-home")),
            (&[("XDG_CACHE_HOME", &home)], Some("of-xdg")),
            (&[("HOME", &home)], None),
            (&[("HF_TOKEN", "t"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")], None),
        ];
        for (variables, want) in cases {
            let variable =
                |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
            assert_eq!(token(&variable).as_deref(), want, "{variables:?}");
        }
    }
}

//! A Hugging Face hub on this machine, for tests: the endpoints that `huggingface_hub` and `hf-hub`
//! ask, on a loopback port, with faults that a test plans.
//!
//! `scripts/check_hub.py` lets Python's `huggingface_hub` use the same server, so that it answers
//! as the real one does. Large files (LFS) are behind a redirect to another host name, which refuses
//! a token, as storage behind signed addresses does.

// Each test program uses its part of it.
#![allow(dead_code, unused_imports, unreachable_pub, reason = "shared by several programs")]

mod answer;
mod fault;
mod store;
mod wire;

use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use fault::{Fault, What};
pub use store::{Access, Repository, Store, is_large, sha256};

/// A request, as the server has seen it.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: String,
    /// Path and query.
    pub target: String,
    pub range: Option<String>,
    pub has_token: bool,
}

/// Which answers have the headers of Xet storage, which this server has none of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Xet {
    #[default]
    None,
    /// The redirect to the file, as on the hub, which has all files behind plain addresses too.
    Redirect,
    /// The answer with the file, as behind a mirror that follows the redirect and keeps its headers.
    File,
}

/// What the threads of a server share.
#[derive(Default)]
pub struct State {
    pub store: Store,
    pub faults: Vec<Fault>,
    pub seen: Vec<Seen>,
    /// Entries on one page of a listing; 0: all.
    pub page: usize,
    /// Which answers about large files say that these lie in Xet storage.
    pub xet: Xet,
    port: u16,
}

/// A server. Its threads live as long as the process.
pub struct Loopback {
    state: Arc<Mutex<State>>,
    port: u16,
}

impl Loopback {
    /// Starts a server on a free port.
    pub fn start(store: Store) -> Loopback {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let state = Arc::new(Mutex::new(State { store, port, ..State::default() }));
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().filter_map(Result::ok) {
                let state = Arc::clone(&shared);
                std::thread::spawn(move || serve(stream, &state));
            }
        });
        Loopback { state, port }
    }

    /// Its address.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// What it has and what it has seen.
    pub fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// From now on this goes wrong.
    pub fn plan(&self, fault: Fault) {
        self.state().faults.push(fault);
    }

    /// The requests so far whose method and target contain a text.
    pub fn count(&self, method: &str, text: &str) -> usize {
        self.state().seen.iter().filter(|seen| seen.method == method && seen.target.contains(text)).count()
    }

    /// Forgets requests and faults.
    pub fn forget(&self) {
        let mut state = self.state();
        state.seen.clear();
        state.faults.clear();
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One connection: one request and its answer.
fn serve(mut stream: TcpStream, state: &Mutex<State>) {
    let Some(request) = wire::read(&mut stream) else { return };
    let (answer, what) = {
        let mut state = lock(state);
        let seen = Seen {
            method: request.method.clone(),
            target: request.target.clone(),
            range: request.header("range").map(str::to_owned),
            has_token: request.header("authorization").is_some(),
        };
        let what = fault::take(&mut state.faults, &seen);
        state.seen.push(seen);
        let answer = answer::answer(&mut state, &request);
        (answer, what)
    };
    // A connection that is gone is the client's business.
    let _ = wire::write(&mut stream, &request, answer, what);
}

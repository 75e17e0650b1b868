//! A server of tiny models, and clients that ask it.
#![allow(dead_code, reason = "each test file takes what it needs")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

use finetune_dataset::ChatTokenizer;
use finetune_model::adapter::Adapter;
use finetune_model::{EngineSettings, Model, Placement};
use finetune_serve::{Bounds, Served, Server, Settings, Stopper};
use serde_json::{Value, json};

/// After so long a server hangs.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) const ENGINE: EngineSettings =
    EngineSettings { slots: 8, queue: 16, cache_bytes: 1 << 30, prefix_bytes: 64 << 20, speculate: 0 };

pub(crate) const CHAT: &str = "/v1/chat/completions";
pub(crate) const TEXT: &str = "/v1/completions";

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn quickstart() -> PathBuf {
    repository().join("datasets/quickstart/base")
}

pub(crate) fn tokenizer() -> ChatTokenizer {
    ChatTokenizer::load(&quickstart(), None).expect("a tokenizer")
}

/// The quickstart's base. It takes longer texts than it was made for.
pub(crate) fn tiny() -> Model {
    let mut model = Model::load(&quickstart(), &Placement::cpu(None)).expect("a model");
    model.config.max_position_embeddings = 1 << 20;
    model
}

/// A golden model of a family, and the same with its adapter.
pub(crate) fn golden(family: &str) -> [Model; 2] {
    let directory = repository().join("tests/goldens/models").join(family);
    let mut base = Model::load(&directory, &Placement::cpu(None)).expect("a model");
    base.config.max_position_embeddings = 4096;
    let mut adapted = base.clone();
    let adapter = Adapter::read(&directory.join("adapter"), &base.config).expect("an adapter");
    adapted.attach(&adapter).expect("attached");
    [base, adapted]
}

pub(crate) fn served(id: &str, parent: Option<&str>, model: Model) -> Served {
    Served::new(id.to_owned(), parent.map(str::to_owned), model, tokenizer(), (0.0, 1.0))
}

/// A request with more fields.
pub(crate) fn with(mut request: Value, more: Value) -> Value {
    if let (Some(request), Value::Object(more)) = (request.as_object_mut(), more) {
        request.extend(more);
    }
    request
}

/// A question whose answer is drawn.
pub(crate) fn question(seed: u64) -> Value {
    json!({"messages": [{"role": "user", "content": "Hi"}], "temperature": 1.5, "seed": seed, "max_tokens": 1500})
}

/// The tiny model with a template that writes calls of tools so.
#[expect(clippy::disallowed_methods, reason = "a file of tests")]
pub(crate) fn calling_as(calls: &str) -> Served {
    let template = format!(
        "{{% for message in messages %}}{{{{ '<|' + message['role'] + '|>\\n' }}}}\
        {{% if message.tool_calls %}}{calls}{{% else %}}{{{{ message['content'] }}}}{{% endif %}}{{{{ '<|end|>' }}}}{{% endfor %}}\
        {{% if add_generation_prompt %}}{{{{ '<|assistant|>\\n' }}}}{{% endif %}}"
    );
    let folder = tempfile::tempdir().expect("a directory");
    let file = folder.path().join("calling.jinja");
    std::fs::write(&file, template).expect("written");
    let tokenizer = ChatTokenizer::load(&quickstart(), Some(&file)).expect("a tokenizer");
    Served::new("tiny".to_owned(), None, tiny(), tokenizer, (0.0, 1.0))
}

pub(crate) fn settings() -> Settings {
    Settings {
        host: "127.0.0.1".to_owned(),
        port: 0,
        key: None,
        max_tokens: 16,
        grace: Duration::ZERO,
        adapters_dir: None,
        bounds: Bounds::default(),
    }
}

/// A server that runs on a thread. It stops when it is dropped.
pub(crate) struct Running {
    pub(crate) address: SocketAddr,
    pub(crate) stopper: Stopper,
    thread: Option<JoinHandle<Result<(), finetune_serve::ServeError>>>,
}

impl Running {
    /// The tiny model under the name `tiny`.
    pub(crate) fn tiny(settings: Settings) -> Running {
        Running::start(settings, ENGINE, vec![served("tiny", None, tiny())])
    }

    /// Adapters that are loaded later are the tiny model as well.
    pub(crate) fn start(settings: Settings, engine: EngineSettings, all: Vec<Served>) -> Running {
        let server = Server::start(settings).expect("a server");
        let loader = |name: &str, path: &Path| match path.file_name().is_some_and(|name| name == "good") {
            true => Ok(served(name, Some("tiny"), tiny())),
            false => Err("it is no adapter".to_owned()),
        };
        server.ready(all, engine, Box::new(loader), None, Box::new(|_| {})).expect("a thread");
        Running::of(server)
    }

    pub(crate) fn of(server: Server) -> Running {
        let (address, stopper) = (server.address(), server.stopper());
        Running { address, stopper, thread: Some(std::thread::spawn(move || server.wait())) }
    }

    /// Waits for the end of a server that was asked to stop.
    pub(crate) fn ended(&mut self) -> Result<(), String> {
        let thread = self.thread.take().expect("it was not waited for");
        thread.join().expect("no panic").map_err(|error| error.to_string())
    }

    pub(crate) fn get(&self, path: &str) -> Response {
        ask(self.address, "GET", path, &[], "")
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Response {
        ask(self.address, "POST", path, &[], &body.to_string())
    }

    pub(crate) fn stream(&self, path: &str, body: &Value) -> Stream {
        let head = head("POST", path, &[], body.to_string().len());
        let mut socket = connect(self.address);
        write!(socket, "{head}{body}").expect("asked");
        Stream::of(socket)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stopper.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Response {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }
}

pub(crate) fn connect(address: SocketAddr) -> TcpStream {
    let socket = TcpStream::connect(address).expect("somebody listens");
    socket.set_read_timeout(Some(DEADLINE)).expect("a deadline");
    socket.set_write_timeout(Some(DEADLINE)).expect("a deadline");
    socket
}

fn head(method: &str, path: &str, headers: &[(&str, &str)], length: usize) -> String {
    let mut head = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: {length}\r\n");
    if !headers.iter().any(|(name, _)| *name == "Host") {
        head += "Host: localhost\r\n";
    }
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    head + "\r\n"
}

pub(crate) fn ask(address: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Response {
    let mut socket = connect(address);
    // A server that refuses a body may close before it has read all of it.
    let _ = socket.write_all(format!("{}{body}", head(method, path, headers, body.len())).as_bytes());
    let mut stream = Stream::of(socket);
    let mut body = String::new();
    while let Some(line) = stream.line() {
        body += &line;
    }
    Response { status: stream.status, head: stream.head, body }
}

/// An answer that comes piece by piece.
pub(crate) struct Stream {
    pub(crate) status: u16,
    pub(crate) head: String,
    body: Box<dyn BufRead>,
}

impl Stream {
    fn of(socket: TcpStream) -> Stream {
        let mut reader = BufReader::new(socket);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head).expect("a head within the deadline") == 0 {
                break;
            }
        }
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        let is_chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
        let body: Box<dyn BufRead> = match is_chunked {
            true => Box::new(BufReader::new(Chunks { reader, left: 0, is_first: true })),
            false => Box::new(reader),
        };
        Stream { status, head, body }
    }

    fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        match self.body.read_line(&mut line) {
            Ok(0) | Err(_) => None,
            Ok(_) => Some(line),
        }
    }

    /// The data of the next event. `None`: the stream has ended.
    pub(crate) fn event(&mut self) -> Option<String> {
        loop {
            let line = self.line()?;
            if let Some(data) = line.strip_prefix("data: ") {
                return Some(data.trim_end().to_owned());
            }
        }
    }

    /// The objects of all events. The last event says that there are no more.
    pub(crate) fn objects(mut self) -> Vec<Value> {
        let events: Vec<String> = std::iter::from_fn(|| self.event()).collect();
        let (last, events) = events.split_last().expect("an event");
        assert_eq!(last, "[DONE]");
        events.iter().map(|event| serde_json::from_str(event).expect("JSON")).collect()
    }
}

/// The bytes of a chunked body.
struct Chunks {
    reader: BufReader<TcpStream>,
    left: usize,
    is_first: bool,
}

impl Read for Chunks {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        if self.left == 0 {
            let mut line = String::new();
            if !std::mem::replace(&mut self.is_first, false) {
                self.reader.read_line(&mut line)?;
                line.clear();
            }
            self.reader.read_line(&mut line)?;
            self.left = usize::from_str_radix(line.trim(), 16).unwrap_or(0);
        }
        let most = bytes.len().min(self.left);
        let count = self.reader.read(&mut bytes[..most])?;
        self.left -= count;
        Ok(count)
    }
}

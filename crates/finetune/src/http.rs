//! Answers GET requests within bounds: one thread, a few connections, small requests without a
//! body, a deadline for each. Slow, endless or many clients cost the others nothing. The newest are
//! served first.
//!
//! A general server (tiny_http was used before) waits for the body of one client while the others
//! wait. It also ends for good if no descriptors are left.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Bytes of a request.
const LONGEST_REQUEST: usize = 8 << 10;
const MOST_HEADERS: usize = 64;
/// The most connections at a time. If one more comes, the oldest is closed.
const MOST_CONNECTIONS: usize = 32;
/// The most connections that are taken in one turn.
const BURST: usize = 64;
/// From the connection to the last byte of the answer.
const DEADLINE: Duration = Duration::from_secs(5);
/// After the system could not give a connection.
const PAUSE: Duration = Duration::from_millis(50);

/// An answer: the number and words of the status line, and a text.
pub(crate) struct Answer {
    pub(crate) status: &'static str,
    pub(crate) text: String,
}

/// Answers until the process ends. `answer` is told the path of a GET request.
pub(crate) fn serve(listener: &TcpListener, answer: &dyn Fn(&str) -> Answer) -> std::io::Result<()> {
    listener.set_nonblocking(true)?;
    let mut connections: VecDeque<Connection> = VecDeque::new();
    loop {
        wait(listener, &connections);
        take(listener, &mut connections);
        let now = Instant::now();
        connections.retain_mut(|connection| connection.until > now && connection.go_on(answer));
    }
}

/// Waits until a client connects, sends something or can receive something, or its time is over.
fn wait(listener: &TcpListener, connections: &VecDeque<Connection>) {
    let mut places = vec![PollFd::new(listener, PollFlags::IN)];
    places.extend(
        connections.iter().map(|it| {
            PollFd::new(&it.socket, if it.left.is_some() && !it.done { PollFlags::OUT } else { PollFlags::IN })
        }),
    );
    let until = connections.iter().map(|it| it.until).min();
    let time = until.map(|until| until.saturating_duration_since(Instant::now()));
    let time = time.and_then(|time| Timespec::try_from(time).ok());
    // Ignore the error: after an interruption the loop calls it again.
    let _ = poll(&mut places, time.as_ref());
}

fn take(listener: &TcpListener, connections: &mut VecDeque<Connection>) {
    for _ in 0..BURST {
        match listener.accept() {
            Ok((socket, _)) => {
                if socket.set_nonblocking(true).is_err() {
                    continue;
                }
                if connections.len() == MOST_CONNECTIONS {
                    connections.pop_front();
                }
                connections.push_back(Connection::new(socket));
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Err(error) if error.kind() == ErrorKind::Interrupted || error.kind() == ErrorKind::ConnectionAborted => {}
            Err(_) => {
                // No descriptors are left: the oldest connection gives one back.
                connections.pop_front();
                std::thread::sleep(PAUSE);
                return;
            }
        }
    }
}

struct Connection {
    socket: TcpStream,
    until: Instant,
    request: Vec<u8>,
    /// The rest of the answer. `None` while the request is not complete.
    left: Option<Vec<u8>>,
    /// The answer is sent. What the client still sends is read and dropped, since a reset could
    /// take the answer away from it.
    done: bool,
}

impl Connection {
    fn new(socket: TcpStream) -> Connection {
        Connection { socket, until: Instant::now() + DEADLINE, request: Vec::new(), left: None, done: false }
    }

    /// Does what can be done without waiting. Returns false once the connection is over.
    fn go_on(&mut self, answer: &dyn Fn(&str) -> Answer) -> bool {
        if self.done {
            return self.drop_rest();
        }
        if self.left.is_none() {
            match self.read() {
                Reading::NotYet => return true,
                Reading::Over => return false,
                Reading::More => {}
            }
            let Some(reply) = reply(&self.request, answer) else { return true };
            self.left = Some(reply);
        }
        self.write()
    }

    fn read(&mut self) -> Reading {
        let mut piece = [0; LONGEST_REQUEST];
        match self.socket.read(&mut piece) {
            Ok(0) => Reading::Over,
            Ok(count) => {
                self.request.extend_from_slice(&piece[..count]);
                Reading::More
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Reading::NotYet,
            Err(_) => Reading::Over,
        }
    }

    fn drop_rest(&mut self) -> bool {
        let mut piece = [0; LONGEST_REQUEST];
        for _ in 0..BURST {
            match self.socket.read(&mut piece) {
                Ok(0) => return false,
                Ok(_) => {}
                Err(error) => return matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
            }
        }
        true
    }

    fn write(&mut self) -> bool {
        let Some(left) = &mut self.left else { return true };
        loop {
            match self.socket.write(left) {
                Ok(count) if count == left.len() => {
                    self.done = true;
                    return self.socket.shutdown(std::net::Shutdown::Write).is_ok();
                }
                Ok(count) => drop(left.drain(..count)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return error.kind() == ErrorKind::WouldBlock,
            }
        }
    }
}

enum Reading {
    More,
    NotYet,
    Over,
}

/// The answer to a request. `None` while the request is not complete.
fn reply(request: &[u8], answer: &dyn Fn(&str) -> Answer) -> Option<Vec<u8>> {
    let mut headers = [httparse::EMPTY_HEADER; MOST_HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    let refused = |status, text: &str| Some(encoded(&Answer { status, text: text.to_owned() }));
    match parsed.parse(request) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) if request.len() < LONGEST_REQUEST => return None,
        Ok(httparse::Status::Partial) => return refused("431 Request Header Fields Too Large", "too long\n"),
        Err(_) => return refused("400 Bad Request", "not HTTP\n"),
    }
    match (parsed.method, parsed.path) {
        (Some("GET"), Some(path)) => Some(encoded(&answer(path))),
        _ => refused("405 Method Not Allowed", "GET only\n"),
    }
}

fn encoded(answer: &Answer) -> Vec<u8> {
    let Answer { status, text } = answer;
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{text}",
        text.len()
    )
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    fn start() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        std::thread::spawn(move || {
            let answer = |path: &str| Answer { status: "200 OK", text: format!("you asked for {path}\n") };
            serve(&listener, &answer)
        });
        address
    }

    fn connect(address: SocketAddr) -> TcpStream {
        let socket = TcpStream::connect(address).expect("somebody listens");
        socket.set_read_timeout(Some(Duration::from_secs(10))).expect("a deadline");
        socket
    }

    fn ask(address: SocketAddr, request: &[u8]) -> String {
        let mut socket = connect(address);
        socket.write_all(request).expect("asked");
        let mut text = Vec::new();
        let _ = socket.read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    }

    #[test]
    fn requests_and_answers() {
        let address = start();
        let long = [b"GET / HTTP/1.1\r\nX: ".as_slice(), &vec![b'a'; LONGEST_REQUEST]].concat();
        for (request, status) in [
            (b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n".as_slice(), "200 OK"),
            (b"GET /metrics HTTP/1.0\r\n\r\n", "200 OK"),
            (b"POST /metrics HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", "405"),
            (b"\x16\x03\x01\x02\x00 hello", "400"),
            (&long, "431"),
        ] {
            let text = ask(address, request);
            assert!(text.starts_with(&format!("HTTP/1.1 {status}")), "{status}: {text}");
        }
    }

    /// Clients that say nothing, that never end, that are many: the next one is served at once.
    #[test]
    fn nobody_keeps_others_waiting() {
        let address = start();
        let serves = |what: &str| {
            let start = Instant::now();
            assert!(ask(address, b"GET / HTTP/1.1\r\n\r\n").contains("you asked for /"), "{what}");
            assert!(start.elapsed() < DEADLINE / 2, "{what}: {:?}", start.elapsed());
        };
        let mut held = Vec::new();
        for start in [b"".as_slice(), b"GET /", b"POST / HTTP/1.1\r\nContent-Length: 1000000\r\n\r\nabc"] {
            let mut socket = connect(address);
            socket.write_all(start).expect("said");
            held.push(socket);
            serves("a slow client");
        }
        for _ in 0..4 * MOST_CONNECTIONS {
            held.push(connect(address));
        }
        serves("a flood");
        drop(held);
        serves("after a flood");
    }
}

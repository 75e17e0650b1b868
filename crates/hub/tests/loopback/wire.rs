//! HTTP/1.1 on a socket: one request, one answer, the end.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use super::fault::What;

/// Longest head of a request, in bytes.
const LONGEST_HEAD: usize = 64 << 10;

pub struct Request {
    pub method: String,
    /// Path and query, as they came.
    pub target: String,
    headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    pub fn token(&self) -> Option<&str> {
        self.header("authorization")?.strip_prefix("Bearer ")
    }

    /// First and last byte of `Range: bytes=A-B`, for a body of `size` bytes.
    fn range(&self, size: usize) -> Option<(usize, usize)> {
        let (first, last) = self.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
        let first = first.parse().ok()?;
        let last = if last.is_empty() { size.checked_sub(1)? } else { last.parse().ok()? };
        Some((first, last))
    }
}

#[derive(Default)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn json(value: &serde_json::Value) -> Answer {
        let headers = vec![("Content-Type", "application/json".to_owned())];
        Answer { status: 200, headers, body: value.to_string().into_bytes() }
    }

    /// A refusal with the hub's code and message.
    pub fn refusal(status: u16, code: &str, message: &str) -> Answer {
        let mut answer = Answer::json(&serde_json::json!({ "error": message }));
        answer.status = status;
        answer.headers.push(("X-Error-Message", message.to_owned()));
        if !code.is_empty() {
            answer.headers.push(("X-Error-Code", code.to_owned()));
        }
        answer
    }
}

pub fn read(stream: &mut TcpStream) -> Option<Request> {
    stream.set_read_timeout(Some(Duration::from_secs(30))).ok()?;
    let mut bytes = Vec::new();
    let mut piece = [0; 8192];
    let (mut request, end) = loop {
        let read = stream.read(&mut piece).ok().filter(|read| *read > 0)?;
        bytes.extend_from_slice(&piece[..read]);
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut parsed = httparse::Request::new(&mut headers);
        if let Ok(httparse::Status::Complete(end)) = parsed.parse(&bytes) {
            let text = |value: &[u8]| String::from_utf8_lossy(value).into_owned();
            let headers = parsed.headers.iter().map(|header| (header.name.to_owned(), text(header.value))).collect();
            let (method, target) = (parsed.method?.to_owned(), parsed.path?.to_owned());
            break (Request { method, target, headers, body: Vec::new() }, end);
        }
        if bytes.len() > LONGEST_HEAD {
            return None;
        }
    };
    if request.header("expect").is_some() {
        stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").ok()?;
    }
    request.body = bytes.split_off(end);
    if request.header("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked")) {
        request.body = chunked(stream, request.body)?;
        return Some(request);
    }
    let length: usize = request.header("content-length").and_then(|text| text.parse().ok()).unwrap_or(0);
    while request.body.len() < length {
        let read = stream.read(&mut piece).ok().filter(|read| *read > 0)?;
        request.body.extend_from_slice(&piece[..read]);
    }
    Some(request)
}

/// The rest of a body that comes in chunks.
fn chunked(stream: &mut TcpStream, mut bytes: Vec<u8>) -> Option<Vec<u8>> {
    let (mut body, mut at, mut piece) = (Vec::new(), 0, [0; 8192]);
    loop {
        if let Ok(httparse::Status::Complete((head, size))) = httparse::parse_chunk_size(&bytes[at..]) {
            let (start, size) = (at + head, usize::try_from(size).ok()?);
            if bytes.len() >= start + size + 2 {
                body.extend_from_slice(&bytes[start..start + size]);
                at = start + size + 2;
                if size == 0 {
                    return Some(body);
                }
                continue;
            }
        }
        let read = stream.read(&mut piece).ok().filter(|read| *read > 0)?;
        bytes.extend_from_slice(&piece[..read]);
    }
}

/// Sends an answer, with what should go wrong. Files can be asked for by range.
pub fn write(stream: &mut TcpStream, request: &Request, answer: Answer, what: Option<What>) -> std::io::Result<()> {
    let mut answer = answer;
    if let Some(What::Status(status, headers, message)) = &what {
        answer = Answer::refusal(*status, "", message);
        answer.headers.extend(headers.iter().cloned());
    }
    let size = answer.body.len();
    if matches!(what, Some(What::Corrupt))
        && let Some(byte) = answer.body.last_mut()
    {
        *byte ^= 1;
    }
    let is_file = answer.headers.iter().any(|(name, _)| *name == "Accept-Ranges");
    let range = request.range(size).filter(|_| is_file && !matches!(what, Some(What::NoRange)));
    match range {
        Some((first, _)) if first >= size => {
            answer =
                Answer { status: 416, headers: vec![("Content-Range", format!("bytes */{size}"))], body: Vec::new() };
        }
        Some((first, last)) => {
            let last = last.min(size - 1);
            answer.body = answer.body[first..=last].to_vec();
            answer.status = 206;
            answer.headers.push(("Content-Range", format!("bytes {first}-{last}/{size}")));
        }
        None => {}
    }
    if let Some(What::Longer(more)) = what {
        answer.body.extend(vec![b'x'; more]);
    }
    let mut head = format!("HTTP/1.1 {} {}\r\nConnection: close\r\n", answer.status, reason(answer.status));
    head += &format!("Content-Length: {}\r\n", answer.body.len());
    for (name, value) in &answer.headers {
        head += &format!("{name}: {value}\r\n");
    }
    stream.write_all(format!("{head}\r\n").as_bytes())?;
    if request.method == "HEAD" {
        return Ok(());
    }
    match what {
        Some(What::Cut(bytes)) => {
            stream.write_all(&answer.body[..bytes.min(answer.body.len())])?;
            stream.shutdown(std::net::Shutdown::Both)
        }
        Some(What::Stall(bytes, pause)) => {
            stream.write_all(&answer.body[..bytes.min(answer.body.len())])?;
            stream.flush()?;
            std::thread::sleep(pause);
            stream.shutdown(std::net::Shutdown::Both)
        }
        Some(What::Slow(bytes, pause)) => {
            for piece in answer.body.chunks(bytes.max(1)) {
                stream.write_all(piece)?;
                std::thread::sleep(pause);
            }
            Ok(())
        }
        _ => stream.write_all(&answer.body),
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        201 => "Created",
        206 => "Partial Content",
        302 => "Found",
        307 => "Temporary Redirect",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        409 => "Conflict",
        416 => "Range Not Satisfiable",
        429 => "Too Many Requests",
        500 => "Internal Server Error",
        503 => "Service Unavailable",
        _ => "Other",
    }
}

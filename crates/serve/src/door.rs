//! Who is let in: hosts, keys, and the body of a request within its bounds.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, BodyDataStream, Bytes};
use axum::extract::{ConnectInfo, Request, State as Shared};
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;

use crate::connection::{Busy, Connection};
use crate::error::ApiError;
use crate::server::State;

/// Bodies count by pieces of so many bytes. The first piece of each is free, as most have no more.
pub(crate) const PIECE: usize = 256 << 10;

/// How long a body is read on whose request is refused, and how much of it: who still writes does not read the answer.
const HEARD: Duration = Duration::from_secs(2);
const MOST_HEARD: usize = 64 << 20;

/// By this name clients find a request again, in their records and those of proxies.
static REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest name of a request, in bytes.
const LONGEST_ID: usize = 256;

/// Lets a request in, with its whole body. The answer has the name of the request, if it has one.
pub(crate) async fn enter(Shared(state): Shared<Arc<State>>, request: Request, next: Next) -> Response {
    let id = request.headers().get(&REQUEST_ID).filter(|id| id.len() <= LONGEST_ID).cloned();
    let mut response = match admitted(&state, request).await {
        // The room is taken until there is an answer, as what was read of the body is kept that long.
        Ok((request, _room)) => {
            // A stream keeps a clone of it.
            let _busy = request.extensions().get::<Arc<Busy>>().cloned();
            next.run(request).await
        }
        Err(error) => error.into_response(),
    };
    state.metrics.response(response.status().as_u16());
    if let Some(id) = id {
        response.headers_mut().insert(REQUEST_ID.clone(), id);
    }
    response
}

async fn admitted(state: &State, request: Request) -> Result<(Request, Room<'_>), ApiError> {
    let (mut parts, body) = request.into_parts();
    check_host(&parts.headers, &state.settings.host)?;
    if let Some(key) = &state.settings.key
        && parts.uri.path().starts_with("/v1/")
    {
        check_key(&parts.headers, key)?;
    }
    let most = state.settings.bounds.body;
    let announced = text(&parts.headers, header::CONTENT_LENGTH).and_then(|length| length.parse::<u64>().ok());
    let is_too_large = announced.is_some_and(|length| length > most as u64);
    if is_too_large && parts.headers.contains_key(header::EXPECT) {
        // The client has not begun to write.
        return Err(too_large(most));
    }
    let mut room = Room { state, pieces: Vec::new() };
    let body = read(body, most, announced, &mut room).await?;
    if let Some(ConnectInfo(connection)) = parts.extensions.get::<ConnectInfo<Connection>>() {
        let busy = Arc::new(connection.busy());
        parts.extensions.insert(busy);
    }
    Ok((Request::from_parts(parts, Body::from(body)), room))
}

/// Room for a body among those of all requests.
struct Room<'a> {
    state: &'a State,
    pieces: Vec<OwnedSemaphorePermit>,
}

impl Room<'_> {
    /// Waits for room for so many bytes, for half of the time that a request may take to come: then there is time left
    /// for an answer.
    async fn grow(&mut self, bytes: usize) -> Result<(), ApiError> {
        let has = self.pieces.iter().map(OwnedSemaphorePermit::num_permits).sum::<usize>();
        let lacking = bytes.div_ceil(PIECE).saturating_sub(has + 1);
        if lacking > 0 {
            let pieces = Arc::clone(&self.state.bodies).acquire_many_owned(lacking as u32);
            match timeout(self.state.settings.bounds.request / 2, pieces).await {
                Ok(Ok(pieces)) => self.pieces.push(pieces),
                _ => return Err(ApiError::busy()),
            }
        }
        Ok(())
    }
}

/// The body of a request. Room for as many bytes as are announced is taken at once: of bodies that take it bit by bit, each
/// could wait for what another has.
async fn read(body: Body, most: usize, announced: Option<u64>, room: &mut Room<'_>) -> Result<Bytes, ApiError> {
    let mut stream = body.into_data_stream();
    let mut bytes = Vec::new();
    let mut grown = match announced.unwrap_or(0) {
        length if length > most as u64 => Err(too_large(most)),
        length => room.grow(length as usize).await,
    };
    while grown.is_ok()
        && let Some(piece) = stream.next().await
    {
        let piece = piece.map_err(|_| ApiError::new(StatusCode::BAD_REQUEST, "the body did not come to its end"))?;
        grown = match bytes.len() + piece.len() {
            length if length > most => Err(too_large(most)),
            length => room.grow(length).await,
        };
        bytes.extend_from_slice(&piece);
    }
    if let Err(error) = grown {
        drop(bytes);
        let _ = timeout(HEARD, leave_out(&mut stream, MOST_HEARD)).await;
        return Err(error);
    }
    Ok(bytes.into())
}

/// Reads what comes without keeping it.
async fn leave_out(stream: &mut BodyDataStream, most: usize) {
    let mut left = most;
    while let Some(Ok(piece)) = stream.next().await
        && piece.len() <= left
    {
        left -= piece.len();
    }
}

fn too_large(most: usize) -> ApiError {
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, format!("the body has more than {most} bytes"))
}

fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

/// Refuses pages of other hosts. A name that somebody lets point here (DNS rebinding) is not ours,
/// and a page of another origin names itself.
fn check_host(headers: &HeaderMap, own: &str) -> Result<(), ApiError> {
    // Letters that no name has are not read, and are no name of ours.
    let Some(host) = headers.get(header::HOST) else { return Ok(()) };
    let host = host.to_str().unwrap_or("?");
    if !is_ours(host, own) {
        let message = format!("the name `{host}` is not this server's: use its address, localhost or its --host");
        return Err(ApiError::new(StatusCode::FORBIDDEN, message));
    }
    let origin = headers.get(header::ORIGIN).map(|origin| origin.to_str().unwrap_or("?"));
    let is_own = |origin: &str| origin.split_once("://").is_some_and(|(_, name)| name.eq_ignore_ascii_case(host));
    match origin {
        Some(origin) if !is_own(origin) => {
            Err(ApiError::new(StatusCode::FORBIDDEN, "pages of other servers may not ask this one"))
        }
        _ => Ok(()),
    }
}

fn is_ours(host: &str, own: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|digit| digit.is_ascii_digit()) => name,
        _ => host,
    };
    let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    name.eq_ignore_ascii_case("localhost") || name.eq_ignore_ascii_case(own) || address.parse::<IpAddr>().is_ok()
}

fn check_key(headers: &HeaderMap, key: &str) -> Result<(), ApiError> {
    let given = text(headers, header::AUTHORIZATION).and_then(|value| value.split_once(' '));
    let given = given.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")).map(|(_, given)| given.trim());
    match given {
        Some(given) if is_same(given.as_bytes(), key.as_bytes()) => Ok(()),
        _ => Err(ApiError::bad_key()),
    }
}

/// Takes as long for any key of the same length.
fn is_same(given: &[u8], key: &[u8]) -> bool {
    let differences = given.iter().zip(key).fold(0, |all, (a, b)| std::hint::black_box(all | (a ^ b)));
    given.len() == key.len() && differences == 0
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    #[test]
    fn names_of_this_server() {
        for (host, want) in [
            ("127.0.0.1:8080", true),
            ("localhost", true),
            ("LOCALHOST:1", true),
            ("[::1]:8080", true),
            ("192.168.1.7", true),
            ("box.local:8080", true),
            ("evil.example", false),
            ("localhost.evil.example:8080", false),
            ("127.0.0.1.evil.example", false),
            ("", false),
        ] {
            assert_eq!(is_ours(host, "box.local"), want, "{host}");
        }
    }

    #[test]
    fn pages_of_other_servers_are_refused() {
        for (origin, want) in [
            ("http://127.0.0.1:8080", true),
            ("http://127.0.0.1:9090", false),
            ("https://evil.example", false),
            ("null", false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, HeaderValue::from_static("127.0.0.1:8080"));
            headers.insert(header::ORIGIN, HeaderValue::from_static(origin));
            assert_eq!(check_host(&headers, "127.0.0.1").is_ok(), want, "{origin}");
        }
    }

    #[test]
    fn keys() {
        for (value, want) in [
            ("Bearer secret", true),
            ("bearer secret", true),
            ("Bearer secre", false),
            ("Bearer secret2", false),
            ("Basic secret", false),
            ("secret", false),
            ("Bearer ", false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, HeaderValue::from_static(value));
            assert_eq!(check_key(&headers, "secret").is_ok(), want, "{value}");
        }
        assert!(check_key(&HeaderMap::new(), "secret").is_err());
    }
}

//! Answers as a stream of server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures::stream::unfold;
use serde_json::Value;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::timeout;

use crate::answering::{Finish, Piece};
use crate::connection::Busy;
use crate::error::ApiError;

/// How long a stream is silent before a comment says that it lives.
const SILENCE: Duration = Duration::from_secs(15);

/// Turns the pieces of an answer into the objects of its stream.
pub(crate) trait Chunks: Send + 'static {
    /// The objects before the first piece.
    fn begin(&mut self) -> Vec<Value>;
    /// The objects of a piece, which is not the end.
    fn piece(&mut self, piece: Piece) -> Vec<Value>;
    /// The objects of the end.
    fn end(&mut self, finish: Finish) -> Result<Vec<Value>, ApiError>;
}

struct Stream<C> {
    chunks: C,
    pieces: UnboundedReceiver<Piece>,
    ready: VecDeque<String>,
    is_over: bool,
    /// The connection is busy as long as the stream is there.
    _busy: Option<Arc<Busy>>,
}

impl<C: Chunks> Stream<C> {
    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.is_over {
                return None;
            }
            match timeout(SILENCE, self.pieces.recv()).await {
                Err(_) => return Some(": waiting\n\n".to_owned()),
                Ok(Some(Piece::Ended(finish))) => {
                    let end = self.chunks.end(finish);
                    self.end(end);
                }
                Ok(Some(piece)) => {
                    let objects = self.chunks.piece(piece);
                    self.ready.extend(objects.iter().map(event));
                }
                // The thread that computes has dropped the request.
                Ok(None) => self.end(Err(ApiError::stopping())),
            }
        }
    }

    fn end(&mut self, end: Result<Vec<Value>, ApiError>) {
        self.is_over = true;
        match end {
            Ok(objects) => self.ready.extend(objects.iter().map(event)),
            Err(error) => self.ready.push_back(event(&error.object())),
        }
        self.ready.push_back("data: [DONE]\n\n".to_owned());
    }
}

/// JSON has no line breaks, so an event is one line.
fn event(object: &Value) -> String {
    format!("data: {object}\n\n")
}

/// The response whose body is the stream. If the client leaves, the receiver is dropped with it,
/// and the thread that computes ends the request.
pub(crate) fn response(mut chunks: impl Chunks, pieces: UnboundedReceiver<Piece>, busy: Option<Arc<Busy>>) -> Response {
    let ready = chunks.begin().iter().map(event).collect();
    let stream = Stream { chunks, pieces, ready, is_over: false, _busy: busy };
    let body = unfold(stream, async |mut stream| {
        let event = stream.next().await?;
        Some((Ok::<Bytes, Infallible>(event.into()), stream))
    });
    let mut response = Body::from_stream(body).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies such as nginx would collect the events otherwise.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

#[cfg(test)]
mod tests {
    use axum::body::to_bytes;
    use serde_json::json;
    use tokio::sync::mpsc::unbounded_channel;

    use super::*;

    /// Says what it hears.
    struct Echo;

    impl Chunks for Echo {
        fn begin(&mut self) -> Vec<Value> {
            vec![json!({"begin": true})]
        }

        fn piece(&mut self, piece: Piece) -> Vec<Value> {
            match piece {
                Piece::Token { text, .. } | Piece::Rest(text) => vec![json!(text)],
                Piece::Begun { .. } | Piece::Ended(_) => Vec::new(),
            }
        }

        fn end(&mut self, finish: Finish) -> Result<Vec<Value>, ApiError> {
            match finish {
                Finish::Failed(reason) => Err(ApiError::failed(reason)),
                _ => Ok(vec![json!("end")]),
            }
        }
    }

    async fn text_of(pieces: Vec<Piece>) -> String {
        let (sender, receiver) = unbounded_channel();
        pieces.into_iter().for_each(|piece| sender.send(piece).expect("somebody listens"));
        drop(sender);
        let response = response(Echo, receiver, None);
        let body = to_bytes(response.into_body(), 1 << 20).await.expect("a body");
        String::from_utf8(body.to_vec()).expect("a text")
    }

    #[tokio::test]
    async fn a_stream_of_events() {
        let token = |text: &str| Piece::Token { token: 0, text: text.to_owned(), logprobs: None };
        let pieces = vec![Piece::Begun { cached: 0 }, token("a\nb"), Piece::Rest("c".to_owned())];
        let text = text_of(pieces.into_iter().chain([Piece::Ended(Finish::Stop)]).collect()).await;
        let events = ["{\"begin\":true}", "\"a\\nb\"", "\"c\"", "\"end\"", "[DONE]"];
        assert_eq!(text, events.map(|event| format!("data: {event}\n\n")).concat());
    }

    #[tokio::test]
    async fn a_failure_is_an_event_at_the_end() {
        for (last, kind) in [
            (vec![Piece::Ended(Finish::Failed("broken".to_owned()))], "server_error"),
            // The thread that computes has dropped the request.
            (vec![], "service_unavailable_error"),
        ] {
            let text = text_of(last).await;
            assert!(text.contains(&format!("\"type\":\"{kind}\"")), "{text}");
            assert!(text.ends_with("\n\ndata: [DONE]\n\n"), "{text}");
        }
    }
}

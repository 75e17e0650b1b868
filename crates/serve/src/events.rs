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
use tokio::time::timeout;

use crate::answering::{Finish, Piece};
use crate::asking::Incoming;
use crate::connection::Busy;
use crate::error::ApiError;

/// How long a stream is silent before a comment says that it lives.
const SILENCE: Duration = Duration::from_secs(15);

/// Turns the pieces of answers into the objects of their stream.
pub(crate) trait Chunks: Send + 'static {
    /// How many answers there are.
    fn choices(&self) -> usize;
    /// The objects before the first piece.
    fn begin(&mut self) -> Vec<Value>;
    /// The objects of a piece of an answer, which is not its end.
    fn piece(&mut self, choice: usize, piece: Piece) -> Vec<Value>;
    /// The objects of the end of an answer.
    fn end(&mut self, choice: usize, finish: Finish) -> Result<Vec<Value>, ApiError>;
    /// The objects behind the end of the last answer.
    fn last(&mut self) -> Vec<Value>;
}

struct Stream<C> {
    chunks: C,
    pieces: Incoming,
    /// Answers that go on.
    left: usize,
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
            match timeout(SILENCE, self.pieces.next()).await {
                Err(_) => return Some(": waiting\n\n".to_owned()),
                Ok(Ok(Some((choice, Piece::Ended(finish))))) => match self.chunks.end(choice, finish) {
                    Ok(objects) => {
                        self.ready.extend(objects.iter().map(event));
                        self.left -= 1;
                        if self.left == 0 {
                            let objects = self.chunks.last();
                            self.end(&objects);
                        }
                    }
                    Err(error) => self.end(&[error.object()]),
                },
                Ok(Ok(Some((choice, piece)))) => {
                    let objects = self.chunks.piece(choice, piece);
                    self.ready.extend(objects.iter().map(event));
                }
                // The thread that computes has dropped the request.
                Ok(Ok(None)) => self.end(&[ApiError::stopping().object()]),
                // Its turn has not come.
                Ok(Err(error)) => self.end(&[error.object()]),
            }
        }
    }

    fn end(&mut self, objects: &[Value]) {
        self.is_over = true;
        self.ready.extend(objects.iter().map(event));
        self.ready.push_back("data: [DONE]\n\n".to_owned());
    }
}

/// JSON has no line breaks, so an event is one line.
fn event(object: &Value) -> String {
    format!("data: {object}\n\n")
}

/// The response whose body is the stream. If the client leaves, the receiver is dropped with it,
/// and the thread that computes ends the request.
pub(crate) fn response(mut chunks: impl Chunks, pieces: Incoming, busy: Option<Arc<Busy>>) -> Response {
    let ready = chunks.begin().iter().map(event).collect();
    let left = chunks.choices();
    let stream = Stream { chunks, pieces, left, ready, is_over: false, _busy: busy };
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

    /// Says what it hears of so many answers.
    struct Echo(usize);

    impl Chunks for Echo {
        fn choices(&self) -> usize {
            self.0
        }

        fn begin(&mut self) -> Vec<Value> {
            vec![json!({"begin": true})]
        }

        fn piece(&mut self, choice: usize, piece: Piece) -> Vec<Value> {
            match piece {
                Piece::Token { text, .. } | Piece::Rest(text) => vec![json!([choice, text])],
                Piece::Begun { .. } | Piece::Prompt(_) | Piece::Ended(_) => Vec::new(),
            }
        }

        fn end(&mut self, choice: usize, finish: Finish) -> Result<Vec<Value>, ApiError> {
            match finish {
                Finish::Failed(reason) => Err(ApiError::failed(reason)),
                _ => Ok(vec![json!([choice, "end"])]),
            }
        }

        fn last(&mut self) -> Vec<Value> {
            vec![json!("last")]
        }
    }

    async fn text_of(choices: usize, pieces: Vec<(usize, Piece)>) -> String {
        let (sender, receiver) = unbounded_channel();
        pieces.into_iter().for_each(|piece| sender.send(piece).expect("somebody listens"));
        drop(sender);
        let response = response(Echo(choices), Incoming::new(receiver, Duration::MAX), None);
        let body = to_bytes(response.into_body(), 1 << 20).await.expect("a body");
        String::from_utf8(body.to_vec()).expect("a text")
    }

    #[tokio::test]
    async fn a_stream_of_events() {
        let token = |text: &str| Piece::Token { token: 0, text: text.to_owned(), logprobs: None };
        let one = vec![
            (0, Piece::Begun { cached: 0 }),
            (0, token("a\nb")),
            (0, Piece::Rest("c".to_owned())),
            (0, Piece::Ended(Finish::Stop)),
        ];
        let events = ["{\"begin\":true}", "[0,\"a\\nb\"]", "[0,\"c\"]", "[0,\"end\"]", "\"last\"", "[DONE]"];
        assert_eq!(text_of(1, one).await, events.map(|event| format!("data: {event}\n\n")).concat());
        // The stream ends with the last answer.
        let two =
            vec![(1, token("a")), (1, Piece::Ended(Finish::Stop)), (0, token("b")), (0, Piece::Ended(Finish::Length))];
        let events = ["{\"begin\":true}", "[1,\"a\"]", "[1,\"end\"]", "[0,\"b\"]", "[0,\"end\"]", "\"last\"", "[DONE]"];
        assert_eq!(text_of(2, two).await, events.map(|event| format!("data: {event}\n\n")).concat());
    }

    #[tokio::test]
    async fn a_turn_that_does_not_come_ends_the_stream() {
        let (sender, receiver) = unbounded_channel();
        let response = response(Echo(1), Incoming::new(receiver, Duration::from_millis(20)), None);
        let body = to_bytes(response.into_body(), 1 << 20).await.expect("a body");
        let text = String::from_utf8(body.to_vec()).expect("a text");
        assert!(text.contains("queue_timeout") && text.ends_with("\n\ndata: [DONE]\n\n"), "{text}");
        assert!(sender.is_closed(), "the request has ended");
    }

    #[tokio::test]
    async fn a_failure_is_an_event_at_the_end() {
        for (last, kind) in [
            (vec![(0, Piece::Ended(Finish::Failed("broken".to_owned())))], "server_error"),
            // The thread that computes has dropped the request.
            (vec![], "service_unavailable_error"),
            (vec![(1, Piece::Ended(Finish::Stop))], "service_unavailable_error"),
        ] {
            let text = text_of(2, last).await;
            assert!(text.contains(&format!("\"type\":\"{kind}\"")), "{text}");
            assert!(text.ends_with("\n\ndata: [DONE]\n\n"), "{text}");
        }
    }
}

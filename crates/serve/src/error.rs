//! What goes wrong: at the start, for the program; with a request, in OpenAI's form.

use std::io;
use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use finetune_dataset::DatasetError;
use finetune_model::Refusal;
use serde_json::{Value, json};
use thiserror::Error;

/// Why a server does not start, or has ended.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The address is in use, not of this machine, or not allowed.
    #[error("cannot listen at {host}:{port}: {source}")]
    Bind {
        /// The name or address.
        host: String,
        /// The port.
        port: u16,
        /// What the system says.
        source: io::Error,
    },
    /// The system gives no threads or timers.
    #[error("cannot start the server: {0}")]
    Start(io::Error),
    /// The thread that computes has ended by itself, which is a bug.
    #[error("the thread that computes has ended")]
    Computing,
    /// Another rank that holds layers of the model is lost.
    #[error("{what}")]
    Lost {
        /// What has happened.
        what: String,
    },
}

/// Letters of a message, which may show what a request has.
const LONGEST_MESSAGE: usize = 2000;

/// An error in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    message: String,
    /// The field of the request that is wrong.
    param: Option<String>,
    code: Option<&'static str>,
    retry_after: Option<u32>,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, message: impl Into<String>) -> ApiError {
        let mut message = message.into();
        if let Some((end, _)) = message.char_indices().nth(LONGEST_MESSAGE) {
            message.truncate(end);
            message.push_str(" ...");
        }
        ApiError { status, message, param: None, code: None, retry_after: None }
    }

    /// A field with a value that cannot be.
    pub(crate) fn field(param: impl Into<String>, message: impl Into<String>) -> ApiError {
        let error = ApiError::new(StatusCode::BAD_REQUEST, message);
        ApiError { param: Some(param.into()), ..error }
    }

    /// Something that OpenAI's interface has and this server has not.
    pub(crate) fn unsupported(param: &str, message: impl Into<String>) -> ApiError {
        ApiError { code: Some("unsupported_value"), ..ApiError::field(param, message) }
    }

    pub(crate) fn with_code(self, code: &'static str) -> ApiError {
        ApiError { code: Some(code), ..self }
    }

    pub(crate) fn bad_key() -> ApiError {
        let message = "the key is missing or wrong: send `Authorization: Bearer KEY`";
        ApiError::new(StatusCode::UNAUTHORIZED, message).with_code("invalid_api_key")
    }

    pub(crate) fn no_model(asked: &str, there: &[String]) -> ApiError {
        let message = format!("the model `{asked}` does not exist; there are: {}", there.join(", "));
        let error = ApiError { param: Some("model".to_owned()), ..ApiError::new(StatusCode::NOT_FOUND, message) };
        error.with_code("model_not_found")
    }

    pub(crate) fn loading() -> ApiError {
        ApiError { retry_after: Some(5), ..ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the model is loading") }
    }

    pub(crate) fn stopping() -> ApiError {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the server is stopping")
    }

    /// Another rank is lost, so this one ends too, and its launcher may start all again.
    pub(crate) fn lost(what: &str) -> ApiError {
        let message = format!("a rank that holds a part of the model is lost: {what}");
        ApiError { retry_after: Some(5), ..ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message) }
    }

    pub(crate) fn busy() -> ApiError {
        let message = "too many requests are waiting already; try again later";
        let error = ApiError::new(StatusCode::TOO_MANY_REQUESTS, message).with_code("queue_full");
        ApiError { retry_after: Some(1), ..error }
    }

    /// Others were answered all the time.
    pub(crate) fn waited(seconds: u64) -> ApiError {
        let message = format!("the turn of this request has not come within {seconds} s; try again later");
        let error = ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message).with_code("queue_timeout");
        ApiError { retry_after: Some(5), ..error }
    }

    /// An adapter takes too long to load. `who`: what loads it.
    pub(crate) fn not_loaded(who: &str, longest: Duration) -> ApiError {
        let message = format!("the adapter was not loaded within {} s by {who}; try again later", longest.as_secs());
        ApiError { retry_after: Some(5), ..ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message) }
    }

    pub(crate) fn of_refusal(refusal: &Refusal, param: &str) -> ApiError {
        match refusal {
            Refusal::QueueFull { .. } => ApiError::busy(),
            Refusal::TooLong { .. } | Refusal::TooLarge { .. } => {
                ApiError::field(param, refusal.to_string()).with_code("context_length_exceeded")
            }
            Refusal::Empty | Refusal::Token { .. } => ApiError::field(param, refusal.to_string()),
        }
    }

    /// An error of the chat template or the tokenizer, which did not take what a request has.
    pub(crate) fn of_text(error: &DatasetError, param: &str) -> ApiError {
        ApiError::field(param, error.to_string())
    }

    /// The model or the program failed.
    pub(crate) fn failed(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// OpenAI's word for the kind of error.
    fn kind(&self) -> &'static str {
        match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::SERVICE_UNAVAILABLE => "service_unavailable_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        }
    }

    pub(crate) fn object(&self) -> Value {
        let ApiError { message, param, code, .. } = self;
        json!({"error": {"message": message, "type": self.kind(), "param": param, "code": code}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.object())).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

//! The page at `/`: a small chat, in one file without anything from elsewhere.

use axum::http::{HeaderValue, header};
use axum::response::{Html, IntoResponse, Response};

use crate::asking::new_id;
use crate::error::ApiError;

const PAGE: &str = include_str!("page.html");
/// Stands in the page for a random number of each answer. Only script and style with it are obeyed.
const NONCE: &str = "NONCE";

/// Nothing from elsewhere is loaded or asked, and no other page shows this one.
const POLICY: &str = "default-src 'none'; script-src 'nonce-NONCE'; style-src 'nonce-NONCE'; connect-src 'self'; \
                      form-action 'none'; frame-ancestors 'none'; base-uri 'none'";

pub(crate) async fn page() -> Result<Response, ApiError> {
    let nonce = new_id("page")?;
    let policy = HeaderValue::try_from(POLICY.replace(NONCE, &nonce));
    let policy = policy.map_err(|error| ApiError::failed(error.to_string()))?;
    let mut response = Html(PAGE.replace(NONCE, &nonce)).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_SECURITY_POLICY, policy);
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    Ok(response)
}

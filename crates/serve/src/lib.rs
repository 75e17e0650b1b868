//! An OpenAI-compatible server over a model and its adapters.
//!
//! Owns: what OpenAI's requests and answers look like, the thread that computes, connections and
//! their bounds. Must never know: the command line, training, what a run directory is.
//! Start reading at [`Server`] in `server.rs`, then `chat.rs`, which takes one request the whole
//! way:
//!
//! - a connection and its deadlines: `connection.rs`; who is let in: `door.rs`;
//! - a request: `fields.rs` (typed values), `asked.rs` (settings), `messages.rs` (a conversation);
//! - the form that an answer has to have: `forms.rs`, `harmony_forms.rs` (of gpt-oss),
//!   `form_bounds.rs` (what is too large), `grammar.rs` (which tokens fit);
//! - calls that it has to have: `call_form.rs` (how the template writes them), `call_grammar.rs`, `value_grammar.rs`
//!   (arguments that are not JSON), `text_grammar.rs`, `schema_kinds.rs`;
//! - which model: `catalog.rs`, `adapters.rs` (loaded and unloaded while it runs);
//! - on the way to computing and back: `asking.rs`;
//! - computing: `computing.rs` (the thread), `answering.rs` (tokens to text, on that thread);
//! - what an answer consists of: `marking.rs` (how the model's template marks it), `parts.rs` (reasoning, text,
//!   calls), `harmony.rs` (gpt-oss), `tool_calls.rs`, `call_formats.rs` (calls of the families), `literals.rs`;
//! - an answer: `chat.rs`, `completions.rs`, `events.rs` (as a stream);
//! - other ranks that hold layers of the model: `others.rs` (what they are told), `leading.rs` (by the first rank),
//!   `following.rs` (what they do), `others_models.rs` and `others_forms.rs` (adapters and forms, on those ranks),
//!   `elsewhere.rs` (when they have these, on the first rank);
//! - what went wrong: `error.rs`; numbers: `metrics.rs`; the page: `page.rs`.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod adapters;
mod answering;
mod asked;
mod asking;
mod call_form;
mod call_formats;
mod call_grammar;
mod catalog;
mod chat;
mod completions;
mod computing;
mod connection;
mod door;
mod elsewhere;
mod error;
mod events;
mod fields;
mod following;
mod form_bounds;
mod forms;
mod free_forms;
mod grammar;
mod harmony;
mod harmony_forms;
mod leading;
mod literals;
mod marking;
mod messages;
mod metrics;
mod others;
mod others_forms;
mod others_models;
mod page;
mod parts;
mod schema_kinds;
mod server;
mod settings;
mod text_grammar;
mod tool_calls;
mod value_grammar;

pub use catalog::{Loader, Say, Served};
pub use error::ServeError;
pub use following::{Tell, follow};
pub use others::{Check, Heard, Others, Reply};
pub use server::{Server, Stopper};
pub use settings::{Bounds, Settings};

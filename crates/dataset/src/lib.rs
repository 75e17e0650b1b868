//! Rows of text in, tokens with a mask out, and the plan of which row is trained on when.
//!
//! **Owns** the way rows → chat template → tokens → mask, and the plan: `(seed, step) → rows`,
//! `(step, rank, world) → its share`.
//!
//! **Never knows** gradients, addresses or devices.
//!
//! **Start reading** at [`Dataset::load`] in `load.rs`, then `reading.rs`, which takes one line the whole way in order:
//! `jsonl.rs` (lines of a file), `row.rs` with `messages.rs` and `row_of_tokens.rs` (row formats), `chat.rs` with `by_turn.rs`
//! (conversations to sequences), `plain.rs` (plain text), `template.rs` (chat templates; `source.rs`, `generation.rs` and
//! `python*.rs` make minijinja behave as transformers' jinja2 does), `tokenizer.rs`, `mask.rs` (which tokens are trained
//! on). `texts.rs` and `variants.rs` see to it that what a row says reaches its text, `notes.rs` and `ends.rs` to what is said
//! about all rows. [`Plan`] in `plan.rs` stands alone, on the counter-based generator of `random.rs`.

#![forbid(unsafe_code)]

mod by_turn;
mod chat;
mod ends;
mod error;
mod failure;
mod generation;
mod jsonl;
mod load;
mod mask;
mod messages;
mod notes;
mod other_kinds;
mod plain;
mod plan;
mod python;
mod python_methods;
mod random;
mod reading;
mod row;
mod row_of_tokens;
mod source;
mod template;
mod texts;
mod tokenizer;
mod variants;

pub use ends::Ends;
pub use error::{BadRow, BadRows, DatasetError};
pub use load::{Counts, Dataset, Origin, Row, resolve_files, unused_files};
pub use plan::Plan;
pub use template::Rendered;
pub use tokenizer::ChatTokenizer;

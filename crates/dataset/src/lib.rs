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
//! `python*.rs` make minijinja behave as transformers' jinja2 does), `tokenizer.rs` (`text_source.rs`: from which files;
//! `carried.rs`: into which; `chunks.rs`: word by word), `mask.rs` (which tokens are trained on). `texts.rs` and `variants.rs`
//! see to it that what a row says reaches its text, `notes.rs` and `ends.rs` to what is said about all rows. Templates and
//! tokenizers are foreign work: `guard.rs`. What was read before is kept: `kept.rs`. [`Plan`] in `plan.rs` stands alone, on the counter-based generator of `random.rs`.

#![forbid(unsafe_code)]

mod added_tokens;
mod by_turn;
mod carried;
mod chat;
mod chunks;
mod ends;
mod error;
mod failure;
mod generation;
pub mod guard;
mod integers;
mod jsonl;
mod kept;
mod load;
mod mask;
mod messages;
mod notes;
mod other_kinds;
mod percent;
mod plain;
mod plan;
mod python;
mod python_filters;
mod python_methods;
mod python_text;
mod random;
mod reading;
mod row;
mod row_of_tokens;
mod source;
mod stream;
mod template;
mod text_source;
mod texts;
mod tokenizer;
mod variants;

pub use ends::Ends;
pub use error::{BadRow, BadRows, DatasetError};
pub use load::{Counts, Dataset, Origin, Row, resolve_files, unused_files};
pub use plan::Plan;
pub use stream::TextStream;
pub use template::Rendered;
pub use text_source::TextSource;
pub use tokenizer::ChatTokenizer;

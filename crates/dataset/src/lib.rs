//! Rows of text in, tokens with a mask out, and the plan of which row is trained on when.
//!
//! **Owns** the way rows → chat template → tokens → mask, and the plan: `(seed, step) → rows`,
//! `(step, rank, world) → its share`.
//!
//! **Must never know** gradients, addresses or devices.
//!
//! **Start reading** at [`Dataset::load`] in `load.rs`, then `reading.rs`, which takes one line the
//! whole way. The files in the order of that way:
//!
//! - which files: `files.rs`, `splits.rs`; of which kind: `kinds.rs`, `other_kinds.rs`;
//! - rows of a file, one after the other: `source.rs`, `record.rs`, and for each kind `jsonl.rs`,
//!   `array.rs`, `table.rs`, `parquet_rows.rs`; `json.rs`;
//! - under our names: `columns.rs`; which of them are held back: `shares.rs`;
//! - row formats: `row.rs`, `sharegpt.rs`, `messages.rs`, `calls.rs`, `row_of_tokens.rs`;
//! - conversations to sequences: `chat.rs`, `chat_reader.rs`, `by_turn.rs`, `thought.rs`; what a row
//!   says must reach its text: `texts.rs`, `variants.rs`; plain text: `plain_text.rs`;
//! - a conversation that is to be answered, in the same way: `asked.rs`;
//! - chat templates: `template.rs`. `template_rewrite.rs`, `template_tags.rs`, `percent*.rs`,
//!   `generation.rs`, `integers.rs` and `python*.rs` make minijinja behave as transformers' jinja2;
//! - the tokenizer: `tokenizer.rs`, `text_source.rs` (from which files), `added_tokens.rs` and
//!   `tokenizer_class.rs` (what the configs change), `chunks.rs` (word by word), `exported_files.rs`
//!   (into which files), `llama_cpp.rs` (into GGUF's words), `gguf_texts.rs` (out of them),
//!   `tiktoken.rs` (out of tiktoken's), `stream.rs` (tokens to text), `stops.rs` (where that text
//!   ends), `reasoning.rs` (what of it is reasoning);
//! - which tokens are trained on: `mask.rs`; the result: `token_row.rs`;
//! - which bytes a token stands for: `token_bytes.rs`;
//! - what time a template is told: `clock.rs`;
//! - about all rows: `notes.rs`, `ends.rs`, `counts.rs`; what was read before: `row_cache.rs`.
//!
//! What can be wrong: `problem.rs` (a row), `error.rs` (all else). Templates and tokenizers are
//! foreign work, which `guard.rs` bounds. [`Plan`] in `plan.rs` stands alone, on the random numbers
//! of `epoch_random.rs`.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod added_tokens;
mod array;
mod asked;
mod by_turn;
mod calls;
mod chat;
mod chat_reader;
mod chunks;
pub mod clock;
mod columns;
mod counts;
mod ends;
mod epoch_random;
mod error;
mod exported_files;
mod failure;
mod files;
mod format_problem;
mod generation;
mod gguf_texts;
pub mod guard;
mod integers;
mod json;
mod jsonl;
mod kinds;
mod llama_cpp;
mod load;
mod mask;
mod messages;
mod notes;
mod operators;
mod other_kinds;
mod parquet_rows;
mod percent;
mod plain_text;
mod plan;
mod problem;
mod python;
mod python_filters;
mod python_methods;
mod python_text;
mod reading;
mod reasoning;
mod record;
mod row;
mod row_cache;
mod row_of_tokens;
mod sharegpt;
mod shares;
mod source;
mod splits;
mod stops;
mod stream;
mod table;
mod template;
mod template_loops;
mod template_problem;
mod template_rewrite;
mod template_tags;
mod text_source;
mod texts;
mod thought;
mod tiktoken;
mod token_bytes;
mod token_row;
mod tokenizer;
mod tokenizer_class;
mod variants;

pub use asked::Asked;
pub use counts::Counts;
pub use ends::Ends;
pub use error::{BadRow, BadRows, DatasetError};
pub use files::{matched, resolve_files, unused_files};
pub use format_problem::FormatProblem;
pub use llama_cpp::LlamaCppTokenizer;
pub use load::Dataset;
pub use plan::Plan;
pub use problem::RowProblem;
pub use reasoning::{Reasoning, opened_by};
pub use record::LONGEST_ROW;
pub use shares::Part;
pub use stops::{Stops, beginning};
pub use stream::TextStream;
pub use template::Rendered;
pub use template_problem::{TemplateProblem, Unrendered};
pub use text_source::TextSource;
pub use texts::REASONING as REASONING_TAGS;
pub use token_row::{Origin, Row};
pub use tokenizer::ChatTokenizer;

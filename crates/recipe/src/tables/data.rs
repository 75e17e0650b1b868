//! `[data]`: the rows to train and to evaluate on.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::kind::{
    Between, Columns, Count, Day, Names, Number, Numbers, OnePath, Positive, RowPaths, Switch, Variables, word,
};
use crate::{Format, Overlong, TrainOn, Variable};

table! {
    [data]
    /// The rows, and how they become tokens.
    ///
    /// `train` names at least one file, or a directory that holds `train.jsonl`, `valid.jsonl`
    /// and `test.jsonl`. `eval` is empty if none is named. An entry of either that begins with
    /// `hf://` is a data set of the hub, as it was written. `weights` is empty, or has a number
    /// above 0 for each entry of `train`. `date` has the form YYYY-MM-DD.
    pub struct Data {
        /// JSONL, a JSON array, CSV, TSV or Parquet, also packed with gzip or zstd: a file, a list,
        /// a pattern (`data/*.jsonl`), a directory with `train.jsonl` or the like (and `valid`,
        /// `test`), or a data set of the hub (`hf://owner/name/split`)
        train: Vec<PathBuf> = RowPaths, required(r#"train = "data/train.jsonl""#), Local, [
            "train_file", "train_data", "train_dataset",
            "dataset" => "a path, not a name from a registry",
            "datasets" => "a path, or a list of paths", "data_files", "data_path", "dataset_path",
            "dataset_dir", "data.path", "data.file", "data.files", "data.training", "data.source",
        ];
        /// held-back rows, as `train`
        eval: Vec<PathBuf> = RowPaths,
            empty("no evaluation, unless `train` is a directory with `valid.jsonl`"), Local, [
            "eval_file", "eval_dataset", "eval_data", "validation_file", "valid_data",
            "test_datasets", "data.valid", "data.validation", "data.test", "data.val",
            "data.evaluation",
        ];
        /// instead of `eval`: this share of the rows of `train` is held back, chosen by a hash of
        /// each row's content; equal rows stay together, and rows keep their side as others come
        eval_share: Option<f64> = Number(Between), unset("no part of `train`"), Local, [
            "val_set_size" => "a share between 0 and 1", "val_size" => "a share between 0 and 1",
            "test_size" => "a share between 0 and 1", "validation_split", "eval_split",
            "validation_split_percentage" => "5 is eval_share = 0.05", "data.share",
        ];
        /// the names that the files have for our keys: `{ prompt = "question", completion = "answer" }`;
        /// `role` and `content` are those of messages
        columns: BTreeMap<String, String> = Columns, empty("the usual names"), Local, [
            "column_mapping", "column_map", "input_columns", "data.mapping", "data.fields", "data.column",
            "field_messages" => r#"columns = { messages = "…" }"#,
            "field_instruction" => r#"columns = { instruction = "…" }"#,
            "field_input" => r#"columns = { input = "…" }"#,
            "field_output" => r#"columns = { output = "…" }"#,
            "field_system" => r#"columns = { system = "…" }"#,
            "field_tools" => r#"columns = { tools = "…" }"#,
            "message_field_role" => r#"columns = { role = "…" }"#,
            "message_field_content" => r#"columns = { content = "…" }"#,
            "message_property_mappings" => r#"columns = { role = "…", content = "…" }"#,
            "dataset_text_field" => r#"columns = { text = "…" }"#,
            "prompt_feature" => r#"columns = { prompt = "…" }"#,
            "completion_feature" => r#"columns = { completion = "…" }"#,
            "text_feature" => r#"columns = { text = "…" }"#,
            "chat_feature" => r#"columns = { messages = "…" }"#,
        ];
        /// how often the rows of each entry of `train` come in an epoch: `[1.0, 0.5]`; of a part,
        /// other rows each epoch, fixed by the seed
        weights: Vec<f64> = Numbers(Positive), empty("each row once"), Local, [
            "interleave_probs" => "how often each row comes, not a share of the batch",
            "probabilities" => "how often each row comes, not a share of the batch",
            "dataset_weights", "data.weight", "data.mixture",
        ];
        /// at most this many rows of `train` are read, in the order of the files
        max_rows: Option<usize> = Count(1), unset("all rows"), Local, [
            "max_samples", "max_train_samples", "data.limit", "data.rows",
        ];
        /// how rows are written; `auto`: told from the rows, which must all agree
        format: Format = word::<Format>(), default(Format::Auto), Digest, [
            "dataset_type", "chat_dataset", "formatting", "data_format", "conversation_format",
            "data.type", "data.style",
        ];
        /// longest row, in tokens
        max_seq_len: usize = Count(2), default(2048), Digest, [
            "sequence_len", "sequence_length", "seq_len", "seq_length", "cutoff_len", "max_length",
            "max_seq_length", "model_max_length", "max_len", "block_size", "context_length",
            "max_tokens", "max_sequence_length",
        ];
        /// what happens to longer rows; they are counted and printed
        overlong: Overlong = word::<Overlong>(), default(Overlong::Error), Digest, [
            "truncate" => r#"write overlong = "truncate""#,
            "truncation" => r#"write overlong = "truncate""#, "excess_length_strategy",
            "drop_long" => r#"write overlong = "drop""#, "excess_len",
        ];
        /// several rows in a sequence, never attending to each other
        packing: bool = Switch, default(false), Digest, [
            "sample_packing", "neat_packing" => "rows never attend to each other", "packed", "pack",
            "multipack", "pad_to_sequence_len" => "leave it out",
        ];
        /// the tokens in the loss: those of every assistant turn, of the last one only, or all
        train_on: TrainOn = word::<TrainOn>(), default(TrainOn::Assistant), Digest, [
            "train_on_inputs" => r#"false is train_on = "assistant", true is "all""#,
            "train_on_input" => r#"false is train_on = "assistant", true is "all""#,
            "train_on_prompt" => r#"false is train_on = "assistant", true is "all""#,
            "mask_prompt" => r#"true is train_on = "assistant", false is "all""#,
            "mask_history" => r#"true is train_on = "last""#,
            "completion_only_loss" => r#"true is train_on = "assistant", false is "all""#,
            "assistant_only_loss" => r#"true is train_on = "assistant", false is "all""#,
            "roles_to_train" => r#"["assistant"] is train_on = "assistant""#, "masking_strategy",
        ];
        /// a new order each epoch, fixed by the seed; false: file order
        shuffle: bool = Switch, default(true), Digest, [
            "shuffle_data", "shuffle_merged_datasets",
            "disable_shuffling" => "true is shuffle = false", "dataset_shuffle",
        ];
        /// a Jinja file that renders messages
        chat_template: Option<PathBuf> = OnePath, unset("the model's own"), Digest, [
            "template" => "a file; leave it out for the model's own",
            "chat_template_jinja" => "a file", "chat_template_path", "prompt_template" => "a file",
            "default_chat_template",
        ];
        /// variables that the template reads: `{ enable_thinking = false }`; those of a row or of a
        /// request come first
        chat_template_kwargs: BTreeMap<String, Variable> = Variables, empty("none"), Digest, [
            "template_kwargs", "chat_template_args", "template_variables", "data.variables",
            "apply_chat_template_kwargs", "default_chat_template_kwargs",
            "enable_thinking" => "chat_template_kwargs = { enable_thinking = … }",
            "reasoning_effort" => "chat_template_kwargs = { reasoning_effort = … }",
        ];
        /// special tokens to add to the tokenizer: `["<tool>"]`; the embedding grows if it has no
        /// rows for them
        add_tokens: Vec<String> = Names, empty("none are added"), Shared, [
            "new_tokens", "new_special_tokens", "additional_special_tokens", "tokens",
            "add_special_tokens", "extra_special_tokens",
        ];
        /// what a template that writes today's date writes: `2026-11-27`
        date: Option<String> = Day,
            unset("the day the run started, the same after every resume"), Shared, [
            "date_string", "data.today",
        ];
    }
}

mod asked;
mod counted;
mod ends;
mod formats;
mod gguf;
mod hostile;
mod kinds;
mod llama_cpp;
mod made_up;
mod masks;
mod model_files;
mod plans;
mod python;
mod reaching;
mod rows;
mod shares;
mod streams;
mod templates;
mod text_files;
mod tiktoken;
mod tokenizer_configs;
mod turns;

/// Bounds the memory of foreign work, as the program's own allocator does.
#[global_allocator]
static ALLOCATOR: counted::Counted = counted::Counted;

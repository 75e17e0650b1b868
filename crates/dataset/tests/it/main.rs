mod counted;
mod hostile;
mod made_up;
mod masks;
mod model_files;
mod plans;
mod python;
mod reaching;
mod rows;
mod streams;
mod templates;
mod text_files;
mod turns;

/// As the program's own allocator: it holds foreign work to its share of the memory.
#[global_allocator]
static ALLOCATOR: counted::Counted = counted::Counted;

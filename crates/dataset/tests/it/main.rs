mod made_up;
mod masks;
mod model_files;
mod plans;
mod rows;
mod templates;

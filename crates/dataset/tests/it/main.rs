mod made_up;
mod masks;
mod model_files;
mod plans;
mod reaching;
mod rows;
mod templates;
mod turns;

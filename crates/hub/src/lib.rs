//! Models and data from and to the Hugging Face hub.

//! An OpenAI-compatible server over a model and its adapters.

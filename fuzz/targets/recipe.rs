//! A recipe: it is refused with locations inside of the text, or what it resolves to reads back to the
//! same recipe.
#![no_main]

use std::path::Path;

use finetune_recipe::{Location, Recipe, RecipeError};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let parse = |text: &str| Recipe::parse(text, Path::new("/home/ada/recipe.toml"), &[], None);
    match parse(text) {
        Ok(recipe) => assert_eq!(parse(&recipe.to_toml()).expect("a resolved recipe"), recipe),
        Err(RecipeError::Problems(problems)) => {
            for problem in &problems.problems {
                if let Location::Span(span) = &problem.location {
                    assert!(span.start <= span.end && span.end <= text.len(), "{span:?} of {}", text.len());
                }
            }
            let _ = problems.to_string();
        }
        Err(_) => {}
    }
});

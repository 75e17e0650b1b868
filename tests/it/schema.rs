//! `finetune schema` prints the schema that lies beside the recipes, and every recipe names it.

use finetune_recipe::keys::{KEYS, TABLES};

use crate::folder::repository;
use crate::program::{finetune, run};

#[test]
fn the_program_prints_the_schema_of_the_repository() {
    let ended = run(&mut finetune(["schema"])).expect(0);
    let file = std::fs::read_to_string(repository().join("recipes/recipe.schema.json")).expect("a schema");
    let update = "UPDATE_EXPECT=1 cargo test -p finetune-recipe --test schema";
    assert!(ended.stdout == file, "recipes/recipe.schema.json is stale: {update}");
    assert_eq!(ended.stderr, "");
    let schema = ended.json();
    for table in TABLES {
        assert_eq!(schema["properties"][*table]["additionalProperties"], false, "{table}");
    }
    for key in KEYS {
        let properties = match key.table() {
            "" => &schema["properties"],
            table => &schema["properties"][table]["properties"],
        };
        let described = properties[key.name()]["description"].as_str().unwrap_or_default();
        assert!(described.starts_with(key.about), "{}: {described}", key.path);
    }
}

/// Editors and `scripts/check_schema.sh` find the schema by the first line.
#[test]
fn every_recipe_names_its_schema() {
    for entry in std::fs::read_dir(repository().join("recipes")).expect("recipes") {
        let path = entry.expect("an entry").path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            let text = std::fs::read_to_string(&path).expect("a recipe");
            assert!(text.starts_with("#:schema ./recipe.schema.json\n"), "{}", path.display());
        }
    }
}

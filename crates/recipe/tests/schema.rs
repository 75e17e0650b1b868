//! The JSON schema of recipes, beside the recipes. UPDATE_EXPECT=1 rewrites it.

use finetune_recipe::keys::KEYS;
use finetune_recipe::schema::json;

#[test]
fn the_schema_describes_every_key() {
    let schema = json();
    expect_test::expect_file!["../../../recipes/recipe.schema.json"].assert_eq(&schema);
    for key in KEYS {
        assert!(schema.contains(&format!("\"{}\": {{ \"description\": \"", key.name())), "{}", key.path);
    }
}

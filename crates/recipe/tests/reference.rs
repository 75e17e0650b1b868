//! `recipes/README.md` is made from the declarations of the keys. UPDATE=1 rewrites it.

use std::path::Path;

use finetune_recipe::keys::KEYS;
use finetune_recipe::reference::markdown;

#[test]
#[allow(clippy::disallowed_methods, reason = "a documentation page of the source tree needs no durable write")]
fn the_readme_documents_every_key() {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes/README.md");
    let made = markdown();
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&readme, &made).unwrap();
    }
    let found = std::fs::read_to_string(&readme).unwrap_or_default();
    assert!(found == made, "recipes/README.md is stale: UPDATE=1 cargo test -p finetune-recipe --test reference");
    for key in KEYS {
        assert!(found.contains(&format!("| `{}` |", key.name())), "{}", key.path);
        assert!(!key.about.is_empty() && !key.about.contains('\n'), "{}", key.path);
    }
}

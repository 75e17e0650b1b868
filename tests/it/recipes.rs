//! The recipes, rows and hostfiles that the repository ships for real models are of the kind that
//! the program reads. Their figures are tested in `crates/trainer/src/memory/shipped.rs`.

use std::path::Path;

use finetune_rendezvous::Hostfile;

use crate::folder::repository;
use crate::program::{finetune, run};

#[test]
fn recipes_of_real_models_name_their_schema_and_run_from_here() {
    let mut recipes = 0;
    let folders = ["models", "packed"].map(|name| repository().join("recipes").join(name));
    for entry in folders.iter().flat_map(|folder| std::fs::read_dir(folder).expect("recipes")) {
        let path = entry.expect("an entry").path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        recipes += 1;
        let text = std::fs::read_to_string(&path).expect("a recipe");
        assert!(text.starts_with("#:schema ../recipe.schema.json\n"), "{}", path.display());
        let recipe = finetune_recipe::Recipe::load(&path, &[], None).unwrap_or_else(|error| panic!("{error}"));
        assert!(recipe.data.train.iter().all(|file| file.is_file()), "{}: rows are missing", path.display());
        let name = path.file_stem().expect("a name").to_string_lossy();
        let folder = path.parent().and_then(Path::file_name).expect("a folder").to_string_lossy();
        assert!(text.contains(&format!("recipes/{folder}/{name}.toml")), "{name}: its comment names another file");
        assert!(recipe.output_dir.ends_with(format!("runs/{name}")), "{}", recipe.output_dir.display());
    }
    assert!(recipes > 16);
}

/// `datasets/examples` has a file for each format, which `auto` recognizes too.
#[test]
fn rows_of_each_format_are_read() {
    let output = tempfile::tempdir().expect("a folder");
    for format in ["messages", "prompt_completion", "alpaca", "sharegpt", "text"] {
        for asked in [format, "auto"] {
            let file = format!("../datasets/examples/{format}.jsonl");
            let sets = [
                format!("data.train={file}"),
                format!("data.eval={file}"),
                format!("data.format={asked}"),
                "data.max_seq_len=2048".to_owned(),
                format!("output_dir={}", output.path().join("run").display()),
            ];
            let recipe = repository().join("recipes/quickstart.toml");
            let mut command = finetune(["validate", "--json"]);
            command.arg(recipe).args(sets.iter().flat_map(|set| ["--set", set]));
            let found = run(&mut command).expect(0).json();
            assert_eq!(found["train"]["rows"].as_u64(), Some(4), "{format} as {asked}: {found}");
            // Of all formats but text, the answers alone are trained on.
            let unmasked = if format == "text" { 4 } else { 0 };
            assert_eq!(found["train"]["unmasked"].as_u64(), Some(unmasked), "{format} as {asked}: {found}");
        }
    }
}

#[test]
fn the_hostfile_of_two_macs_has_two_hosts() {
    let path = repository().join("recipes/models/two-macs.hosts.json");
    let hostfile = Hostfile::load(&path).unwrap_or_else(|error| panic!("{error}"));
    let names: Vec<&str> = hostfile.hosts.iter().map(|host| host.ssh.as_str()).collect();
    assert_eq!(names, ["mac-1", "mac-2"]);
}

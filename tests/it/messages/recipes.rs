//! Mistakes in a recipe or in `--set`.

use expect_test::expect;

use super::{RUN, check};
use crate::folder::{CRASH_RECIPE, Folder};

#[test]
fn an_unknown_key() {
    let folder = Folder::with_recipe(&CRASH_RECIPE.replace("dropout = 0.1", "dropuot = 0.1"));
    check(
        &folder,
        &RUN,
        expect![[r#"
        error: unknown key `dropuot` in [lora]
         --> recipe.toml:9:1
          |
        9 | dropuot = 0.1
          | ^^^^^^^
          |
          = hint: did you mean `dropout`?
        (exit code 2)
    "#]],
    );
}

#[test]
fn a_key_of_another_program() {
    let recipe = CRASH_RECIPE.replace("rank = 4", "lora_r = 4").replace("max_steps = 10", "iters = 10");
    check(
        &Folder::with_recipe(&recipe),
        &RUN,
        expect![[r#"
        error: unknown key `lora_r` in [lora]
         --> recipe.toml:7:1
          |
        7 | lora_r = 4
          | ^^^^^^
          |
          = hint: ours is `rank`

        error: unknown key `iters` in [train]
          --> recipe.toml:14:1
           |
        14 | iters = 10
           | ^^^^^
           |
           = hint: ours is `max_steps`; mlx-lm counts micro-batches, ours are optimizer steps: divide by its grad_accumulation_steps
        (exit code 2)
    "#]],
    );
}

#[test]
fn a_value_of_the_wrong_type() {
    let folder = Folder::with_recipe(&CRASH_RECIPE.replace("learning_rate = 5e-2", "learning_rate = \"5e-2\""));
    check(
        &folder,
        &RUN,
        expect![[r#"
        error: expected a number, found a string
          --> recipe.toml:18:17
           |
        18 | learning_rate = "5e-2"
           |                 ^^^^^^
           |
           = hint: write it without quotes: 5e-2
        (exit code 2)
    "#]],
    );
}

#[test]
fn no_toml_at_all() {
    check(
        &Folder::with_recipe("[model\npath = 1\n"),
        &RUN,
        expect![[r#"
        error: not TOML: unclosed table, expected `]`
         --> recipe.toml:1:7
          |
        1 | [model
          |       ^
        (exit code 2)
    "#]],
    );
}

#[test]
fn an_unknown_key_on_the_command_line() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    check(
        &folder,
        &["run", "recipe.toml", "--set", "lora.rnak=8", "--set", "lora.rank=many"],
        expect![[r#"
        error: --set lora.rnak=8: unknown key `rnak` in [lora]

        hint: did you mean `rank`?

        error: --set lora.rank=many: expected an integer, found a string
        (exit code 2)
    "#]],
    );
}

#[test]
fn a_target_that_no_layer_has() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    check(
        &folder,
        &["run", "recipe.toml", "--set", "lora.target_modules=[\"c_attn\"]"],
        expect![[r#"
        reading rows
        error: target_modules: `c_attn` matches no linear layer of the model

        hint: linear layers of this model are called `q_proj`, `k_proj`, `v_proj`, `o_proj` and 3 more
        (exit code 2)
    "#]],
    );
}

//! Wrong recipes, each with what the user is told: "line:column message | hint".

mod common;

use common::{MINIMAL, parse_with, seen};

/// Problems of the shortest valid recipe with a snippet below it, whose first line is line 5.
fn below(snippet: &str) -> String {
    seen(parse_with(&format!("{MINIMAL}{snippet}"), &[]))
}

/// Checks (snippet below the shortest recipe, what is said).
#[track_caller]
fn check_below(cases: &[(&str, &str)]) {
    let mut wrong = String::new();
    for (snippet, expected) in cases {
        let found = below(snippet);
        // The words of TOML syntax errors are the toml crate's.
        let same = if expected.ends_with(": ") { found.contains("not TOML: ") } else { found == *expected };
        if !same {
            wrong += &format!("{snippet}\n  expected {expected}\n  found    {found}\n");
        }
    }
    assert!(wrong.is_empty(), "\n{wrong}");
}

#[test]
fn wrong_types() {
    check_below(&[
        ("[lora]\nrank = \"16\"", "6:8 expected an integer, found a string | write it without quotes: 16"),
        ("[lora]\nrank = 16.0", "6:8 expected an integer, found a number with a fraction"),
        ("[lora]\nrank = \"big\"", "6:8 expected an integer, found a string"),
        ("[lora]\nuse_dora = \"true\"", "6:12 expected true or false, found a string | write it without quotes: true"),
        ("[lora]\nuse_dora = 1", "6:12 expected true or false, found an integer"),
        (
            "[optimizer]\nlearning_rate = \"2e-4\"",
            "6:17 expected a number, found a string | write it without quotes: 2e-4",
        ),
        ("[optimizer]\nlearning_rate = 1979-05-27", "6:17 expected a number, found a date"),
        ("[optimizer]\nbetas = 0.9", "6:9 expected a list of two numbers, found a number with a fraction"),
        ("[optimizer]\nbetas = [0.9]", "6:9 `optimizer.betas` must have two numbers, found 1"),
        ("[optimizer]\nbetas = [0.9, \"x\"]", "6:15 expected a number, found a string"),
        (
            "[train]\nepochs = 1.5",
            "6:10 expected an integer, found a number with a fraction | for a part of an epoch use `max_steps`",
        ),
        (
            "[lora]\nrank_pattern = 8",
            "6:16 expected a table of module names and numbers, found an integer | for example { \"q_proj\" = 8 }",
        ),
        (
            "[lora]\ntarget_modules = 3",
            "6:18 expected \"all-linear\", a list of names, or a regular expression, found an integer",
        ),
        ("[lora]\ntarget_modules = [\"q_proj\", 3]", "6:29 expected a string, found an integer | write it in quotes"),
        (
            "[distributed]\ntimeout = 5",
            "6:11 expected a duration such as \"5s\", found an integer | write it with a unit and in quotes, such as \"5s\"",
        ),
        (
            "[distributed]\nports = \"29599-29500\"",
            "6:9 `distributed.ports` must be a port or a range of ports, found \"29599-29500\" | for example \"29500-29599\"",
        ),
        (
            "[distributed]\nports = 0",
            "6:9 `distributed.ports` must be a port or a range of ports, found \"0\" | for example \"29500-29599\"",
        ),
        (
            "[distributed]\njoin_timeout = \"2h\"",
            "6:16 `distributed.join_timeout` must be above 0s and at most 1h, found \"2h\"",
        ),
    ]);
}

#[test]
fn paths_that_are_none_here() {
    check_below(&[
        (
            "eval = \"~/rows.jsonl\"",
            "5:8 `data.eval` starts with `~`, which only a shell replaces | write the whole path, or one relative to the recipe",
        ),
        (
            "eval = \"$DATA/rows.jsonl\"",
            "5:8 `data.eval` starts with `$DATA`, which only a shell replaces | write the whole path, or one relative to the recipe",
        ),
        (
            "eval = \"s3://bucket/rows.jsonl\"",
            "5:8 `data.eval` is an address, and a path is meant | name a path on this machine: nothing is fetched from addresses, nor written to them",
        ),
    ]);
}

#[test]
fn values_out_of_range() {
    check_below(&[
        ("[lora]\nrank = 0", "6:8 `lora.rank` must be at least 1, found 0"),
        ("[lora]\nrank = -0x1", "6:8 not TOML: "),
        ("[lora]\nrank = -3", "6:8 `lora.rank` must be at least 1, found -3"),
        (
            "[lora]\nrank = 99999999999999999999",
            "6:8 `lora.rank` must be at most 9223372036854775807, found 99999999999999999999",
        ),
        ("[lora]\nrank = -99999999999999999999", "6:8 `lora.rank` must be at least 1, found -99999999999999999999"),
        ("[lora]\nalpha = 0", "6:9 `lora.alpha` must be above 0, found 0"),
        ("[lora]\nalpha = nan", "6:9 `lora.alpha` must be above 0 and finite, found nan"),
        ("[lora]\ndropout = 1.0", "6:11 `lora.dropout` must be 0 or more and below 1, found 1.0"),
        ("[lora]\nrank_pattern = { q_proj = 0 }", "6:27 `lora.rank_pattern` must be at least 1, found 0"),
        ("[lora]\nalpha_pattern = { q_proj = -1 }", "6:28 `lora.alpha_pattern` must be above 0, found -1"),
        (
            "[lora]\nlayers_to_transform = []",
            "6:23 `lora.layers_to_transform` must name a layer | leave it out for all layers",
        ),
        ("[lora]\ntarget_modules = \"\"", "6:18 `lora.target_modules` must not be empty"),
        ("[lora]\ntarget_modules = []", "6:18 `lora.target_modules` must name a module | or \"all-linear\""),
        ("max_seq_len = 1", "5:15 `data.max_seq_len` must be at least 2, found 1"),
        ("eval = []", "5:8 `data.eval` must name a file"),
        ("eval = \" \"", "5:8 `data.eval` must not be empty"),
        ("[train]\nmicro_batch_size = 0", "6:20 `train.micro_batch_size` must be at least 1, found 0"),
        ("[train]\nglobal_batch_size = 0", "6:21 `train.global_batch_size` must be at least 1, found 0"),
        ("[train]\nmax_grad_norm = -1", "6:17 `train.max_grad_norm` must be 0 or more, found -1"),
        ("[optimizer]\nlearning_rate = inf", "6:17 `optimizer.learning_rate` must be above 0 and finite, found inf"),
        (
            "[optimizer]\nlearning_rate = 1e999",
            "6:17 `optimizer.learning_rate` must be above 0 and finite, found 1e999",
        ),
        ("[optimizer]\nlearning_rate = 0.0", "6:17 `optimizer.learning_rate` must be above 0, found 0.0"),
        ("[optimizer]\nbetas = [0.9, 1.0]", "6:15 `optimizer.betas` must be 0 or more and below 1, found 1.0"),
        ("[optimizer]\neps = 0", "6:7 `optimizer.eps` must be above 0, found 0"),
        ("[optimizer]\nweight_decay = -0.1", "6:16 `optimizer.weight_decay` must be 0 or more, found -0.1"),
        ("[schedule]\nmin_lr_ratio = 1.1", "6:16 `schedule.min_lr_ratio` must be from 0 to 1, found 1.1"),
        ("[schedule]\nwarmup_ratio = 3", "6:16 `schedule.warmup_ratio` must be from 0 to 1, found 3"),
        ("[checkpoint]\nkeep_last = 0", "6:13 `checkpoint.keep_last` must be at least 1, found 0"),
        ("[checkpoint]\nevery = 0", "no problem"),
        ("[log]\nevery = 0", "6:9 `log.every` must be at least 1, found 0"),
        (
            "[log]\nprometheus = \"9400\"",
            "6:14 `log.prometheus` must be a host and a port, found \"9400\" | for example \"127.0.0.1:9400\"",
        ),
        ("[log]\ntensorboard = 1", "6:15 expected true, false or a folder, found an integer"),
        (
            "[log]\ntensorboard = \"true\"",
            "6:15 expected true or false, found a string | write it without quotes: true",
        ),
        ("[log]\non_end = \" \"", "6:10 `log.on_end` must not be empty"),
        ("[log]\non_end = [\"ls\"]", "6:10 expected a string, found a list"),
        ("[distributed]\nvirtual_ranks = 0", "6:17 `distributed.virtual_ranks` must be at least 1, found 0"),
        ("[distributed]\nmin_ranks = 0", "6:13 `distributed.min_ranks` must be at least 1, found 0"),
        ("[distributed]\ntimeout = \"0s\"", "6:11 `distributed.timeout` must be above 0s and at most 1h, found \"0s\""),
        ("[distributed]\ntimeout = \"2h\"", "6:11 `distributed.timeout` must be above 0s and at most 1h, found \"2h\""),
        (
            "[distributed]\ntimeout = \"5\"",
            "6:11 `distributed.timeout` must be a duration, found \"5\" | a whole number and ms, s, m or h, such as \"5s\" or \"500ms\"",
        ),
    ]);
}

#[test]
fn unknown_words() {
    check_below(&[
        (
            "[schedule]\nname = \"cosin\"",
            "6:8 `schedule.name` must be one of \"constant\", \"linear\", \"cosine\", found \"cosin\" | did you mean \"cosine\"?",
        ),
        (
            "[optimizer]\nname = \"adamw_torch\"",
            "6:8 `optimizer.name` must be \"adamw\", found \"adamw_torch\" | did you mean \"adamw\"?",
        ),
        (
            "[train]\nmethod = \"qlora\"",
            "6:10 `train.method` must be one of \"lora\", \"full\", found \"qlora\" | write \"lora\", with quantization = \"nf4\" in [model]",
        ),
        ("train_on = true", "5:12 expected one of \"assistant\", \"last\", \"all\", found a boolean"),
        (
            "format = \"ShareGPT\"",
            "5:10 `data.format` must be one of \"auto\", \"messages\", \"prompt_completion\", \"text\", \"alpaca\", \"sharegpt\", \"tokens\", found \"ShareGPT\" | did you mean \"sharegpt\"?",
        ),
    ]);
}

/// (a word for `model.quantization`, what is said of it; "": it is one of ours)
#[test]
fn words_of_other_programs_for_packed_bases() {
    let ours = ["nf4", "int8", "mlx4", "mlx8", "mxfp4"];
    assert_eq!(finetune_recipe::Quantization::ALL, ours);
    let as_it_is = "a base that is packed already is read as it is: leave `quantization` out";
    let near = |word: &str| format!("did you mean \"{word}\"?");
    let cases = [("4bit", near("nf4")), ("8bit", near("int8")), ("affine", near("mlx4")), ("MXFP4", near("mxfp4"))];
    let packed = ["gptq", "awq", "fp8"].map(|word| (word, as_it_is.to_owned()));
    for (word, hint) in cases.into_iter().chain(packed) {
        let found = seen(parse_with(MINIMAL, &[&format!("model.quantization={word}")]));
        assert!(found.ends_with(&format!(", found \"{word}\" | {hint}")), "{word}: {found}");
    }
    for word in ours {
        let recipe = parse_with(MINIMAL, &[&format!("model.quantization={word}")]);
        assert!(recipe.is_ok_and(|recipe| recipe.to_toml().contains(&format!("quantization = \"{word}\""))), "{word}");
    }
}

/// (a key and a word that other tools have for a value of it, what is said of it)
#[test]
fn words_of_other_programs_for_where_layers_are() {
    let disk = "write \"disk\": each layer is read from its file whenever a step comes to it";
    let back = "write \"wave\": in turn there and back";
    for (key, word, hint) in [
        ("model.residency", "cpu", format!("{disk}; where to compute is `device`")),
        ("model.residency", "cpu_offload", disk.to_owned()),
        ("model.residency", "gpu", "did you mean \"memory\"?".to_owned()),
        ("parallel.placement", "zigzag", back.to_owned()),
        ("parallel.placement", "ZBV", back.to_owned()),
        ("parallel.placement", "gpipe", "write \"contiguous\": layers next to each other".to_owned()),
        ("parallel.placement", "interleaved", "write \"ring\": layer n on the (n mod stages)th rank".to_owned()),
        ("parallel.placement", "wav", "did you mean \"wave\"?".to_owned()),
    ] {
        let found = seen(parse_with(MINIMAL, &[&format!("{key}={word}")]));
        assert!(found.ends_with(&format!(", found \"{word}\" | {hint}")), "{key}, {word}: {found}");
    }
}

#[test]
fn keys_that_contradict_each_other() {
    check_below(&[
        (
            "[train]\nepochs = 1\nmax_steps = 5",
            "7:13 `train.epochs` and `train.max_steps` say the same thing twice | keep one of them",
        ),
        (
            "[schedule]\nwarmup_steps = 1\nwarmup_ratio = 0.1",
            "7:16 `schedule.warmup_steps` and `schedule.warmup_ratio` say the same thing twice | keep one of them",
        ),
        (
            "[train]\nmethod = \"full\"\n[lora]\nrank = 8",
            "8:8 `lora.rank` has no effect with `train.method = \"full\"` | remove the [lora] table, or use method = \"lora\"",
        ),
        ("[train]\nmethod = \"full\"\n[lora]", "no problem"),
        (
            "[eval]\nearly_stopping_patience = 3",
            "6:27 `eval.early_stopping_patience` needs evaluation rows, and `data.eval` is not given | name a file of held-back rows: `eval` in [data]; or hold a part of the rows back: `eval_share`",
        ),
        (
            "[eval]\nsamples = 3",
            "6:11 `eval.samples` needs evaluation rows, and `data.eval` is not given | name a file of held-back rows: `eval` in [data]; or hold a part of the rows back: `eval_share`",
        ),
        ("[eval]\nsamples = 0", "no problem"),
        ("eval = \"v.jsonl\"\n[eval]\nsamples = 3", "no problem"),
        ("eval_share = 0.1\n[eval]\nsamples = 3", "no problem"),
        (
            "eval = \"v.jsonl\"\neval_share = 0.1",
            "6:14 `data.eval` and `data.eval_share` say the same thing twice | keep one of them",
        ),
        ("[train]\nglobal_batch_size = 2\nmicro_batch_size = 4", "no problem"),
        (
            "[distributed]\nshares = \"measured\"",
            "6:10 `distributed.shares = \"measured\"` needs `virtual_ranks`: without, another share of the rows is another sum | add virtual_ranks to [distributed], several times the number of machines: the more, the more finely shares follow speed",
        ),
        ("[distributed]\nshares = \"measured\"\nvirtual_ranks = 8", "no problem"),
        ("[distributed]\nshares = \"even\"", "no problem"),
    ]);
}

#[test]
fn whole_recipes() {
    let cases = [
        (
            "",
            "file `path` in [model] is missing | for example, below [model]: path = \"Qwen/Qwen3-0.6B\"\n\
              file `train` in [data] is missing | for example, below [data]: train = \"data/train.jsonl\"",
        ),
        (
            "model = \"gpt2\"\n[data]\ntrain = \"a\"",
            "1:9 expected a table [model], found a string | write it as `path` in [model]\n\
              file `path` in [model] is missing | for example, below [model]: path = \"Qwen/Qwen3-0.6B\"",
        ),
        ("seed = -1\n[model]\npath = \"gpt2\"\n[data]\ntrain = \"a\"", "1:8 `seed` must be at least 0, found -1"),
        ("[model]\npath = \"gpt2\"\n[data]\ntrain = []", "4:9 `data.train` must name a file"),
        (
            "[model]\npath = 3\n[data]\ntrain = [\"a\", 3]",
            "2:8 expected a string, found an integer | write it in quotes\n\
              4:15 expected a string, found an integer | write it in quotes",
        ),
        (
            "[[model]]\npath = \"gpt2\"\n[data]\ntrain = \"a\"",
            "1:1 expected a table [model], found a list | start a line with [model] and write its keys below it\n\
              file `path` in [model] is missing | for example, below [model]: path = \"Qwen/Qwen3-0.6B\"",
        ),
        // Columns count characters, and every problem is found at once, in order of position.
        ("[model]\npath = \"ö\"; x\n", "2:11 not TOML: "),
        (
            "[data]\ntrain = \"ä\"\nlr = 1\n[model]\npath = \"gpt2\"\ndtpye = \"é\" # ü\ndevice = \"gpuu\"",
            "3:1 unknown key `lr` in [data] | ours is `learning_rate` in [optimizer]\n\
             6:1 unknown key `dtpye` in [model] | did you mean `dtype`?\n\
             7:10 `model.device` must be one of \"auto\", \"cpu\", \"gpu\", found \"gpuu\" | did you mean \"gpu\"?",
        ),
    ];
    for (text, expected) in cases {
        let found = seen(parse_with(text, &[]));
        assert!(
            found == expected || (expected.ends_with(": ") && found.starts_with(expected)),
            "{text}\nexpected {expected}\nfound    {found}"
        );
    }
}

#[test]
fn plain_text_has_file_line_and_column() {
    let error = parse_with(&format!("{MINIMAL}[lora]\nrnak = 8\nalpha = -1\n"), &["seed=x"]).unwrap_err();
    expect_test::expect![[r#"
        /home/ada/support-bot.toml:6:1: unknown key `rnak` in [lora]
        /home/ada/support-bot.toml:7:9: `lora.alpha` must be above 0, found -1
        --set seed=x: expected an integer, found a string"#]]
    .assert_eq(&error.to_string());
}

#[test]
fn duplicate_keys_and_broken_text_are_pointed_at() {
    assert!(
        below("[lora]\nrank = 8\nrank = 9").starts_with("7:1 not TOML: duplicate key"),
        "{}",
        below("[lora]\nrank = 8\nrank = 9")
    );
    assert!(below("[lora\nrank = 8").starts_with("5:"), "{}", below("[lora\nrank = 8"));
    let in_quotes = " | in double quotes a backslash begins an escape: use single quotes";
    for (value, is_hinted) in [
        (r#""model\.layers\.0\..*""#, true),
        (r#""C:\Users\ada""#, true),
        (r#""C:\xq""#, true),
        (r"'model\.layers\.0", false),
        (r#""q_proj"#, false),
    ] {
        let found = below(&format!("[lora]\ntarget_modules = {value}\n"));
        assert!(found.starts_with("6:") && found.contains("not TOML: "), "{value}: {found}");
        assert_eq!(found.matches(in_quotes).count(), usize::from(is_hinted), "{value}: {found}");
    }
}

#[test]
fn a_file_that_cannot_be_a_recipe() {
    let missing = finetune_recipe::Recipe::load(std::path::Path::new("/nowhere/recipe.toml"), &[], None);
    assert!(missing.unwrap_err().to_string().starts_with("/nowhere/recipe.toml: cannot read the recipe: "));
    let long = "#".repeat((1 << 20) + 1);
    let expected = "/home/ada/support-bot.toml: 1048577 bytes are too long for a recipe (the limit is 1048576)";
    assert_eq!(seen(parse_with(&long, &[])), expected);
}

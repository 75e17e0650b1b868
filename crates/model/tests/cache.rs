//! Generation that goes on from what an earlier one has read: it gives what a fresh one gives, and
//! only new tokens go through the model. And generation of several rows at once: each gives what it
//! gives alone.

#[path = "golden/families.rs"]
mod golden_families;
mod made;

use finetune_model::adapter::Adapter;
use finetune_model::{
    FloatType, Generation, GenerationStep, KeyValueCache, Model, Placement, RowRequest, Sampling, gpus,
};

/// The families that are tried on a GPU, a software renderer as a rule: those with a cache of a kind of
/// their own, and those that are quick. One generation of each family is in `goldens`.
const ON_GPU: [&str; 18] = [
    "llama",
    "llama3",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
    "gemma3",
    "gemma3_multimodal",
    "qwen3_moe",
    "qwen3_moe_experts",
    "ministral3",
    "granite",
    "olmo3",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_next",
    "lfm2",
    "gemma4",
];

fn families() -> Vec<String> {
    match std::env::var("FINETUNE_TEST_DEVICE").as_deref() {
        Ok("gpu") => ON_GPU.map(str::to_owned).to_vec(),
        _ => golden_families::names(),
    }
}

/// Tokens of an answer.
const ANSWER: usize = 9;

/// The CPU, or with `FINETUNE_TEST_DEVICE=gpu` the first GPU.
fn placement() -> Placement {
    match std::env::var("FINETUNE_TEST_DEVICE").as_deref() {
        Ok("gpu") => {
            let found = gpus(true).into_iter().next().expect("a GPU, or a software renderer");
            Placement::gpu(found.device, FloatType::F32)
        }
        _ => Placement::cpu(None),
    }
}

fn with_adapter(family: &str) -> Model {
    let directory = made::golden(family);
    let mut model = Model::load(&directory, &placement()).expect("the model loads");
    model
        .attach(&Adapter::read(&directory.join("adapter"), &model.config).expect("the adapter loads"))
        .expect("attached");
    model
}

/// Tokens that say nothing: 3, 10, 17, ...
fn text(length: usize, first: u32) -> Vec<u32> {
    (0..length as u32).map(|n| (first + 7 * n) % 96).collect()
}

fn cached(model: &Model, prompt: &[u32], cache: &mut KeyValueCache) -> (Generation, Vec<GenerationStep>) {
    let mut steps = Vec::new();
    let mut each = |step| {
        steps.push(step);
        true
    };
    let generation = model.generate_cached(prompt, ANSWER, Sampling::GREEDY, &[], cache, &mut each);
    (generation.expect("a generation"), steps)
}

/// (what the next prompt shares with the tokens of the turn before, tokens that it has behind that)
const TURNS: [(&str, usize); 5] = [("nothing", 30), ("all", 12), ("all", 1), ("half", 40), ("the first token", 80)];

/// A conversation that goes on, is taken back, and goes on in another way.
#[test]
fn a_kept_beginning_changes_no_token_and_is_not_computed_again() {
    for family in families() {
        let model = with_adapter(&family);
        let mut cache = KeyValueCache::default();
        let mut turn: Vec<u32> = Vec::new();
        for (n, (shared, more)) in TURNS.into_iter().enumerate() {
            let shared = match shared {
                "all" => turn.len(),
                "half" => turn.len() / 2,
                "the first token" => 1,
                _ => 0,
            };
            // The first token behind what is shared differs from that of the turn before.
            let other = turn.get(shared).map_or(3, |token| token + 1);
            let prompt = [&turn[..shared], &text(more, other)].concat();
            let common = cache.tokens().iter().zip(&prompt).take_while(|(kept, token)| kept == token).count();
            // The state of a gated delta net or a convolution cannot go back to an earlier token.
            let has_state = model.config.delta.is_some() || model.config.convolution.is_some();
            let goes_back = has_state && common < cache.tokens().len();
            let common = if goes_back { 0 } else { common };

            let fresh = model.generate(&prompt, ANSWER, Sampling::GREEDY, &[], &mut |_| {}).expect("a generation");
            let (got, steps) = cached(&model, &prompt, &mut cache);
            assert_eq!(got.tokens, fresh.tokens, "{family}: turn {n}");
            assert_eq!(fresh.prompt_computed, prompt.len());
            assert_eq!(got.prompt_computed, prompt.len() - common, "{family}: turn {n}");
            assert!(goes_back || common + 1 >= shared, "{family}: turn {n} keeps {common} of {shared} tokens");
            assert_eq!(steps[0], GenerationStep::Prompt(prompt.len()));
            assert_eq!(steps.len(), 1 + ANSWER, "{family}: the prompt at once, then each token");

            // The last token was chosen, but it has not gone through the model.
            turn = [&prompt[..], &got.tokens].concat();
            assert_eq!(cache.tokens(), &turn[..turn.len() - 1]);
        }
    }
}

/// The same prompt again: its last token has to be computed for its logits.
#[test]
fn the_same_prompt_is_answered_again() {
    let model = with_adapter("qwen3");
    let (prompt, mut cache) = (text(20, 3), KeyValueCache::default());
    let (first, _) = cached(&model, &prompt, &mut cache);
    let (again, _) = cached(&model, &prompt, &mut cache);
    assert_eq!((again.tokens, again.prompt_computed), (first.tokens, 1));
}

/// A long prompt is read in parts. What was read when it is stopped is kept.
#[test]
fn a_prompt_can_be_stopped_between_its_parts() {
    let model = with_adapter("llama");
    let (prompt, mut cache) = (text(1100, 3), KeyValueCache::default());
    let stop = &mut |step: GenerationStep| step != GenerationStep::Prompt(512);
    let stopped = model.generate_cached(&prompt, ANSWER, Sampling::GREEDY, &[], &mut cache, stop).expect("no failure");
    assert_eq!((stopped.tokens.len(), stopped.prompt_computed, cache.tokens().len()), (0, 512, 512));
    let (got, steps) = cached(&model, &prompt, &mut cache);
    let parts: Vec<_> = steps.iter().filter(|step| matches!(step, GenerationStep::Prompt(_))).collect();
    assert_eq!(parts, [&GenerationStep::Prompt(1024), &GenerationStep::Prompt(1100)]);
    assert_eq!(got.prompt_computed, 1100 - 512);
    let fresh = model.generate(&prompt, ANSWER, Sampling::GREEDY, &[], &mut |_| {}).expect("a generation");
    assert_eq!(got.tokens, fresh.tokens);
}

/// A token that the model does not have is refused before anything is forgotten.
#[test]
fn a_wrong_token_leaves_the_cache_as_it_was() {
    let model = with_adapter("qwen2");
    let mut cache = KeyValueCache::default();
    cached(&model, &text(20, 3), &mut cache);
    let before = cache.tokens().to_vec();
    let refused = model.generate_cached(&[1_000_000], 1, Sampling::GREEDY, &[], &mut cache, &mut |_| true);
    assert!(refused.is_err() && cache.tokens() == before);
}

/// (tokens of the prompt, most tokens of the answer). The longest row ends first; the others go on
/// past the room of 64 places, and past 128.
const ROWS: [(usize, usize); 6] = [(90, 5), (1, 40), (30, 60), (64, 1), (7, 0), (33, 100)];

/// Greedy and drawn, in families with windows, head norms and layers without positions.
#[test]
fn rows_at_once_get_the_answers_that_they_get_alone() {
    let drawn = Sampling { temperature: 1.3, top_p: 0.95, seed: 11 };
    for family in families() {
        let model = with_adapter(&family);
        let prompts: Vec<Vec<u32>> = (3..).zip(ROWS).map(|(first, (length, _))| text(length, first)).collect();
        for sampling in [Sampling::GREEDY, drawn] {
            let rows = prompts.iter().zip(ROWS);
            let requests: Vec<RowRequest<'_>> = rows
                .map(|(prompt, (_, max_new_tokens))| RowRequest { prompt, max_new_tokens, sampling, end_ids: &[] })
                .collect();
            let mut heard = vec![Vec::new(); requests.len()];
            let mut each = |row: usize, token| {
                heard[row].push(token);
                true
            };
            let got = model.generate_rows(&requests, &mut each).expect("generations");
            for (n, RowRequest { prompt, max_new_tokens, .. }) in requests.iter().enumerate() {
                let alone = model.generate(prompt, *max_new_tokens, sampling, &[], &mut |_| {}).expect("a generation");
                assert_eq!(got[n], alone, "{family}: row {n}, {sampling:?}");
                assert_eq!(heard[n], alone.tokens, "{family}: row {n}, {sampling:?}");
                assert_eq!(alone.tokens.len(), *max_new_tokens);
            }
        }
    }
}

/// Rows end one by one: at an end token, because the caller has enough, at the limit. The others go
/// on as if nothing had happened.
#[test]
fn a_row_that_ends_changes_nothing_for_the_others() {
    let model = with_adapter("llama");
    let prompts: Vec<Vec<u32>> = (0..4).map(|row| text(20 + row, 3 + row as u32)).collect();
    let alone =
        |row: usize| model.generate(&prompts[row], 12, Sampling::GREEDY, &[], &mut |_| {}).expect("a generation");
    let alone: Vec<Generation> = (0..prompts.len()).map(alone).collect();
    // Row 0 ends where its fourth token first comes up, row 2 after the caller has heard two tokens.
    let (end, limits) = (alone[0].tokens[3], [12, 12, 12, 7]);
    let ends: [&[u32]; 4] = [&[end], &[], &[], &[]];
    let requests: Vec<RowRequest<'_>> = (0..prompts.len())
        .map(|row| RowRequest {
            prompt: &prompts[row],
            max_new_tokens: limits[row],
            sampling: Sampling::GREEDY,
            end_ids: ends[row],
        })
        .collect();
    let mut heard = [0; 4];
    let mut each = |row: usize, _| {
        heard[row] += 1;
        row != 2 || heard[2] < 2
    };
    let got = model.generate_rows(&requests, &mut each).expect("generations");
    let first = alone[0].tokens.iter().position(|token| *token == end).expect("the end token");
    let lengths = [first + 1, 12, 2, 7];
    for (row, length) in lengths.into_iter().enumerate() {
        assert_eq!(got[row].tokens, alone[row].tokens[..length], "row {row}");
    }
    assert_eq!(heard, [first, 12, 2, 7]);
    let stopped: Vec<Option<u32>> = got.iter().map(|generation| generation.stopped_by).collect();
    assert_eq!(stopped, [Some(end), None, None, None]);
}

#[test]
fn no_more_rows_are_taken_at_once_than_have_room() {
    let model = with_adapter("llama");
    let prompt = text(20, 3);
    let request =
        |max_new_tokens| RowRequest { prompt: &prompt, max_new_tokens, sampling: Sampling::GREEDY, end_ids: &[] };
    assert_eq!(model.rows_at_once(&[]), 0);
    assert_eq!(model.rows_at_once(&[request(9); 3]), 3);
    let is_gpu = std::env::var("FINETUNE_TEST_DEVICE").is_ok_and(|device| device == "gpu");
    assert_eq!(model.rows_at_once(&[request(9); 30]), if is_gpu { 8 } else { 16 });
    assert_eq!(model.rows_at_once(&[request(9), request(9), request(usize::MAX), request(9)]), 2);
    assert_eq!(model.rows_at_once(&[request(usize::MAX), request(9)]), 1);
}

/// A token that the model does not have is refused before any row is answered.
#[test]
fn a_wrong_token_in_one_row_is_refused() {
    let model = with_adapter("qwen2");
    let (good, bad) = (text(5, 3), [1_000_000]);
    let requests = [&good[..], &bad].map(|prompt| RowRequest {
        prompt,
        max_new_tokens: 3,
        sampling: Sampling::GREEDY,
        end_ids: &[],
    });
    let refused = model.generate_rows(&requests, &mut |_, _| panic!("a row was answered"));
    assert!(matches!(refused, Err(finetune_model::ModelError::Token { token: 1_000_000, .. })), "{refused:?}");
}

/// More rows than go through the model at once.
#[test]
fn many_rows_are_answered_in_their_order() {
    let model = with_adapter("qwen3");
    let prompts: Vec<Vec<u32>> = (0..19).map(|row| text(3 + row, row as u32)).collect();
    let requests: Vec<RowRequest<'_>> = prompts
        .iter()
        .map(|prompt| RowRequest { prompt, max_new_tokens: 4, sampling: Sampling::GREEDY, end_ids: &[] })
        .collect();
    let mut heard = vec![Vec::new(); requests.len()];
    let mut each = |row: usize, token| {
        heard[row].push(token);
        true
    };
    let got = model.generate_rows(&requests, &mut each).expect("generations");
    for (n, prompt) in prompts.iter().enumerate() {
        let alone = model.generate(prompt, 4, Sampling::GREEDY, &[], &mut |_| {}).expect("a generation");
        assert_eq!((&got[n], &heard[n]), (&alone, &alone.tokens), "row {n}");
    }
}

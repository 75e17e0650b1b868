//! Several processes, threads here, that hold the layers of a model together and have several passes under way: the
//! answers have the bits of one process, no line between two of them holds more than it should, and nobody waits for
//! ever.

mod heard;
mod made;
mod processes;

use std::sync::{Arc, Mutex};

use finetune_model::{
    ChosenToken, Engine, EngineEnd, EngineRequest, EngineSettings, Form, Generation, Model, RowRequest, Sampling,
    Stage, TokenRules,
};

use heard::{DRAWN, Heard, SETTINGS, STEPS, finish, request, submit, text, with_adapter};
use processes::{Seen, Trouble, load, together, together_of};

/// (golden model, its layers): rotary embeddings, experts with latent attention, convolutions, delta nets, norms of all
/// heads, windows, experts of two kinds. In the third the processes have layers of different kinds.
const FAMILIES: [(&str, usize); 8] = [
    ("llama", 3),
    ("deepseek_v3", 3),
    ("lfm2", 3),
    ("qwen3_5", 4),
    ("olmo3", 4),
    ("gemma3", 3),
    ("gpt_oss", 2),
    ("qwen3_moe", 3),
];

/// (tokens of the prompt, most tokens of the answer)
const ROWS: [(usize, usize); 5] = [(20, 30), (11, 12), (70, 25), (600, 9), (15, 40)];

/// Fewer tokens than there are: 0 to 40 without those that were there, so often.
struct FewTokens {
    allowed: [u32; 2],
    left: usize,
}

impl Form for FewTokens {
    fn allowed(&mut self) -> Result<&[u32], String> {
        if self.left > 0 { Ok(&self.allowed) } else { Err("the form has come to its end".to_owned()) }
    }

    fn take(&mut self, token: u32) -> Result<(), String> {
        self.allowed[token as usize / 32] &= !(1 << (token % 32));
        self.left -= 1;
        Ok(())
    }
}

fn rules() -> TokenRules {
    TokenRules { logprobs: Some(5), ..TokenRules::from(DRAWN) }
}

fn prompt(row: usize) -> Vec<u32> {
    text(ROWS[row].0, 3 + row as u32)
}

/// The first rows, asked at once or with so many steps between them.
fn asked(engine: &mut Engine, model: &Arc<Model>, rows: usize, steps: usize) -> Vec<Heard> {
    (0..rows)
        .map(|row| {
            let heard = submit(engine, request(model, &prompt(row), ROWS[row].1, rules()));
            (0..steps).for_each(|_| engine.step());
            heard
        })
        .collect()
}

/// Answers to the first rows, with the logarithms of probabilities, and the most passes that were under way.
fn answers(model: &Arc<Model>, settings: EngineSettings, rows: usize, steps: usize) -> (Vec<Vec<ChosenToken>>, usize) {
    let mut engine = Engine::new(settings);
    let heard = asked(&mut engine, model, rows, steps);
    finish(&mut engine);
    assert_eq!(engine.lost(), None);
    (heard.iter().map(Heard::chosen).collect(), engine.counts().most_passes)
}

/// The first rows without an engine.
fn generated(model: &Model, rows: usize) -> Vec<Generation> {
    let prompts: Vec<Vec<u32>> = (0..rows).map(prompt).collect();
    let requests: Vec<RowRequest<'_>> = prompts
        .iter()
        .zip(ROWS)
        .map(|(prompt, (_, max_new_tokens))| RowRequest { prompt, max_new_tokens, sampling: DRAWN, end_ids: &[] })
        .collect();
    model.generate_rows(&requests, &mut |_, _| true).expect("answers")
}

#[test]
fn as_many_passes_as_processes_if_none_comes_twice() {
    for (stage, passes) in [
        (Stage::contiguous(30, 4, 0), 4),
        (Stage::contiguous(3, 3, 2), 3),
        (Stage::contiguous(5, 1, 0), 1),
        (Stage::in_order(&[1, 4, 2], 0), 3),
        (Stage::in_turn(3, 3, 0), 3),
        (Stage::in_turn(4, 3, 0), 1),
        (Stage::dealt(&[2, 1], 0), 1),
    ] {
        assert_eq!(stage.passes_at_once(), passes, "{stage:?}");
    }
}

#[test]
fn any_number_of_rows_on_any_number_of_processes_has_the_bits_of_one() {
    for (family, layers) in FAMILIES {
        let alone = Arc::new(load(family, None));
        for rows in [1, 2, 3, 5] {
            let (want, _) = answers(&alone, SETTINGS, rows, 0);
            assert!((0..rows).all(|row| want[row].len() == ROWS[row].1), "{family}: all tokens");
            let want_generated = generated(&alone, rows);
            for processes in (1..=4).filter(|&processes| processes <= layers) {
                let work = |model: Arc<Model>| {
                    let at_once = answers(&model, SETTINGS, rows, 0);
                    let one_by_one = answers(&model, SETTINGS, rows, 2);
                    (at_once, one_by_one, generated(&model, rows))
                };
                let all = together((family, layers), processes, Trouble::default(), &Arc::default(), work);
                for (mine, (at_once, one_by_one, generated)) in all.into_iter().enumerate() {
                    let words = format!("{family}: {rows} rows, {mine} of {processes} processes");
                    assert!(at_once.0 == want && one_by_one.0 == want, "{words}");
                    assert_eq!(generated, want_generated, "{words}");
                    // One row has one pass at a time, as with one process.
                    let most = if processes == 1 { 0 } else { rows.min(processes) };
                    assert_eq!(at_once.1, most, "{words}");
                }
            }
        }
    }
}

/// What the last process thinks of a prompt is heard on all of them: also of parts that follow each other, beside an
/// answer, and behind a prompt whose listener has left while it was read.
#[test]
fn prompts_are_scored_as_in_one_process() {
    let scored = TokenRules { of_prompt: true, ..rules() };
    let asked = |model: &Arc<Model>| {
        let mut engine = Engine::new(SETTINGS);
        let gone = submit(&mut engine, request(model, &text(1300, 2), 4, scored.clone()));
        engine.step();
        gone.leave();
        let heard = [
            submit(&mut engine, request(model, &prompt(0), 30, rules())),
            submit(&mut engine, request(model, &text(1300, 5), 4, scored.clone())),
            submit(&mut engine, request(model, &text(40, 9), 0, scored.clone())),
            submit(&mut engine, request(model, &text(1, 9), 2, scored.clone())),
        ];
        finish(&mut engine);
        assert_eq!(engine.lost(), None);
        heard.map(|heard| (heard.scores(), heard.chosen(), heard.end()))
    };
    for (family, layers) in [("llama", 3), ("gemma3", 3), ("qwen3_5", 4)] {
        let want = asked(&Arc::new(load(family, None)));
        assert_eq!(want.each_ref().map(|(scores, ..)| scores.len()), [0, 1299, 39, 0], "{family}");
        for processes in 2..=3 {
            let trouble = Trouble::default();
            let all = together((family, layers), processes, trouble, &Arc::default(), |model| asked(&model));
            assert!(all.iter().all(|got| *got == want), "{family}: {processes} processes");
        }
    }
}

#[test]
fn processes_with_uneven_numbers_of_layers_have_the_bits_of_one() {
    for (family, counts) in
        [("olmo3", &[3, 1][..]), ("olmo3", &[1, 2, 1]), ("qwen3_5", &[1, 3]), ("qwen3_5", &[2, 1, 1])]
    {
        let (want, _) = answers(&Arc::new(load(family, None)), SETTINGS, 3, 0);
        let all =
            together_of(family, counts, Trouble::default(), &Arc::default(), |model| answers(&model, SETTINGS, 3, 0));
        assert!(all.iter().all(|(got, _)| *got == want), "{family}: {counts:?}");
    }
}

/// Requests with and without an adapter join each other, those of one model next to each other, also while a pass of
/// the others is under way. Each gets the logits of its own row.
#[test]
fn rows_with_adapters_that_join_beside_each_other_keep_their_own_logits() {
    /// (whether it has the adapter, tokens of the prompt, most tokens of the answer, steps behind it)
    const ASKED: [(bool, usize, usize, usize); 9] = [
        (false, 20, 30, 0),
        (false, 11, 25, 3),
        (true, 70, 20, 0),
        (true, 15, 28, 1),
        (false, 9, 5, 0),
        (false, 90, 20, 2),
        (false, 30, 9, 5),
        (true, 600, 12, 0),
        (false, 5, 16, 0),
    ];
    let asked_prompt = |n: usize| text(ASKED[n].1, 3 + n as u32);
    for (family, layers) in [("llama", 3), ("deepseek_v3", 3), ("qwen3_5", 4)] {
        let both = |base: Arc<Model>| [Arc::clone(&base), Arc::new(with_adapter(&base, family))];
        let models = both(Arc::new(load(family, None)));
        let want: Vec<Vec<ChosenToken>> = (0..ASKED.len())
            .map(|n| {
                let (has_adapter, _, most, _) = ASKED[n];
                let mut engine = Engine::new(SETTINGS);
                let model = &models[usize::from(has_adapter)];
                let heard = submit(&mut engine, request(model, &asked_prompt(n), most, rules()));
                finish(&mut engine);
                heard.chosen()
            })
            .collect();
        for processes in [2, 3] {
            let all = together((family, layers), processes, Trouble::default(), &Arc::default(), |base| {
                let (models, mut engine) = (both(base), Engine::new(SETTINGS));
                let mut heard = Vec::new();
                for (n, (has_adapter, _, most, steps)) in ASKED.into_iter().enumerate() {
                    let model = &models[usize::from(has_adapter)];
                    heard.push(submit(&mut engine, request(model, &asked_prompt(n), most, rules())));
                    (0..steps).for_each(|_| engine.step());
                }
                finish(&mut engine);
                (heard.iter().map(Heard::chosen).collect::<Vec<_>>(), engine.counts())
            });
            for (mine, (got, counts)) in all.into_iter().enumerate() {
                let words = format!("{family}: {mine} of {processes} processes: {counts:?}");
                assert!(got == want, "{words}");
                assert!(counts.passes.mixed_passes > 0 && counts.most_passes == processes, "{words}");
                // Prompts travel one behind the other, each alone: nine, the longest in two parts.
                assert_eq!((counts.passes.prompt_passes, counts.passes.prompt_parts), (10, 10), "{words}");
            }
        }
    }
}

/// Not only prompts: the next tokens of rows, which are shorter than any of the prompts.
#[test]
fn rows_travel_one_behind_the_other() {
    for (rows, processes, most) in [(1, 3, 1), (2, 2, 2), (2, 3, 2), (3, 3, 3), (5, 3, 3), (5, 4, 4)] {
        let (family, layers) = ("olmo3", 4);
        // Rows of a pass are at most eight.
        let bound = 8 * load(family, None).config.hidden_size * size_of::<f32>();
        for has_engine in [true, false] {
            let seen = Arc::new(Mutex::new(Seen { bound, ..Seen::default() }));
            together((family, layers), processes, Trouble::default(), &seen, |model| match has_engine {
                true => drop(answers(&model, SETTINGS, rows, 0)),
                false => drop(generated(&model, rows)),
            });
            let seen = seen.lock().expect("no panic").most_short;
            assert_eq!(seen, most, "{rows} rows, {processes} processes, {has_engine}");
        }
    }
}

/// Of each row the process of the last layer says what it has chosen: five bytes, and not the logits.
#[test]
fn tokens_travel_and_not_logits() {
    let (family, layers) = ("olmo3", 4);
    let work: [fn(&Arc<Model>); 2] = [
        |model| {
            let mut engine = Engine::new(SETTINGS);
            for (row, (_, most)) in ROWS.into_iter().enumerate() {
                submit(&mut engine, request(model, &prompt(row), most, DRAWN.into()));
            }
            finish(&mut engine);
        },
        |model| drop(generated(model, ROWS.len())),
    ];
    for work in work {
        let seen = Arc::default();
        together((family, layers), 3, Trouble::default(), &seen, |model| work(&model));
        let longest = seen.lock().expect("no panic").longest_heard;
        assert!((5..=5 * ROWS.len()).contains(&longest), "{longest} bytes");
    }
}

/// What only the last process knows is what decides: penalties of what is there already, forms, and why one has failed.
#[test]
fn rules_and_forms_are_followed_over_processes_as_in_one() {
    let penalties = TokenRules { repetition_penalty: 1.4, frequency_penalty: 0.3, min_p: 0.01, ..rules() };
    let fewer = TokenRules { top_k: 7, presence_penalty: 0.5, logit_bias: vec![(11, 4.0), (12, -50.0)], ..rules() };
    let answer = |model: Arc<Model>| {
        let mut engine = Engine::new(SETTINGS);
        let formed = |left| {
            let form: Box<dyn Form> = Box::new(FewTokens { allowed: [u32::MAX, 0x1ff], left });
            EngineRequest { form: Some(form), ..request(&model, &prompt(0), 20, rules()) }
        };
        let heard = [
            submit(&mut engine, request(&model, &prompt(1), 30, penalties.clone())),
            submit(&mut engine, formed(99)),
            submit(&mut engine, request(&model, &prompt(2), 20, fewer.clone())),
            submit(&mut engine, formed(6)),
        ];
        finish(&mut engine);
        heard.map(|heard| (heard.chosen(), heard.end()))
    };
    let want = answer(Arc::new(load("llama", None)));
    assert_eq!(want[1].0.len(), 20);
    assert_eq!(want[3].0.len(), 6, "then it fails");
    assert!(matches!(&want[3].1, Some(EngineEnd::Failed(why)) if why.contains("come to its end")), "{:?}", want[3].1);
    for processes in [2, 3] {
        // The words come in a message of their own.
        let trouble = Trouble { room: 1, ..Trouble::default() };
        for got in together(("llama", 3), processes, trouble, &Arc::default(), answer) {
            assert_eq!(got, want, "{processes} processes");
        }
    }
}

/// Several answers to one prompt, which is read once, beside others that are under way.
#[test]
fn requests_of_one_prompt_get_their_own_tokens() {
    const SAME: usize = 4;
    let answer = |model: Arc<Model>| {
        let mut engine = Engine::new(SETTINGS);
        let mut heard = asked(&mut engine, &model, 2, 3);
        for seed in 0..SAME as u64 {
            let rules = TokenRules { sampling: Sampling { seed, ..DRAWN }, ..rules() };
            heard.push(submit(&mut engine, request(&model, &prompt(3), 12, rules)));
        }
        finish(&mut engine);
        heard.iter().map(|heard| (heard.chosen(), heard.end())).collect::<Vec<_>>()
    };
    for (family, layers) in [("llama", 3), ("lfm2", 3), ("olmo3", 4)] {
        let want = answer(Arc::new(load(family, None)));
        assert!(want[2..].windows(2).any(|two| two[0].0 != two[1].0), "{family}: seeds make other answers");
        for processes in [2, 3] {
            let trouble = Trouble { room: SAME, ..Trouble::default() };
            for (mine, got) in
                together((family, layers), processes, trouble, &Arc::default(), answer).into_iter().enumerate()
            {
                assert!(got == want, "{family}: {mine} of {processes} processes");
            }
        }
    }
}

#[test]
fn parts_of_a_long_prompt_travel_one_behind_the_other() {
    let long = text(1300, 3);
    let answer = |model: Arc<Model>| {
        let mut engine = Engine::new(SETTINGS);
        let heard = submit(&mut engine, request(&model, &long, 6, rules()));
        finish(&mut engine);
        // The same prompt again: its beginning is known.
        let again = submit(&mut engine, request(&model, &long, 6, rules()));
        finish(&mut engine);
        ((heard.chosen(), again.chosen(), again.cached()), engine.counts().most_passes)
    };
    for (family, layers) in [("llama", 3), ("lfm2", 3)] {
        let (want, _) = answer(Arc::new(load(family, None)));
        assert_eq!(want.0, want.1, "{family}");
        for processes in [2, 3] {
            for got in together((family, layers), processes, Trouble::default(), &Arc::default(), answer) {
                assert_eq!(got, (want.clone(), processes), "{family}: {processes} processes");
            }
        }
    }
}

/// Processes and messages of any speed: their lines are bounded, and a process that waits for a minute
/// fails. The seed is in the words.
#[test]
fn nobody_waits_for_ever_whatever_is_slow() {
    let (family, layers) = ("olmo3", 4);
    let (want, _) = answers(&Arc::new(load(family, None)), SETTINGS, ROWS.len(), 0);
    for seed in 1..=6 {
        let processes = 2 + seed as usize % 3;
        let trouble = Trouble { delays: Some(seed), ..Trouble::default() };
        let all = together((family, layers), processes, trouble, &Arc::default(), |model| {
            (answers(&model, SETTINGS, ROWS.len(), 1), generated(&model, 2).len())
        });
        for ((got, most), _) in all {
            assert!(got == want && most == processes, "seed {seed}, {processes} processes, {most} passes at once");
        }
    }
}

#[test]
fn proposed_tokens_and_rows_that_leave_change_nothing() {
    let (family, layers) = ("llama", 3);
    let alone = Arc::new(load(family, None));
    let (want, _) = answers(&alone, SETTINGS, 5, 0);
    let settings = EngineSettings { speculate: 3, ..SETTINGS };
    let greedy = |model: &Arc<Model>, settings| {
        // It repeats itself.
        let mut engine = Engine::new(settings);
        let prompt = text(12, 3).repeat(4);
        let heard = submit(&mut engine, request(model, &prompt, 40, Sampling::GREEDY.into()));
        finish(&mut engine);
        heard.tokens()
    };
    let want_greedy = greedy(&alone, SETTINGS);
    let all = together((family, layers), 3, Trouble::default(), &Arc::default(), |model| {
        let mut engine = Engine::new(settings);
        let heard = asked(&mut engine, &model, 5, 2);
        for step in 0..STEPS {
            // The fifth row leaves after a while, whatever is under way then.
            let gone = if step < 17 { Vec::new() } else { vec![4] };
            engine.step_without(&gone);
        }
        assert!(engine.is_idle());
        let chosen: Vec<_> = heard.iter().map(Heard::chosen).collect();
        (chosen, greedy(&model, settings))
    });
    for (mine, (got, got_greedy)) in all.into_iter().enumerate() {
        assert!(got[..4] == want[..4], "process {mine}");
        let left = got[4].len();
        assert!(
            left < want[4].len() && got[4] == want[4][..left],
            "process {mine}: {left} tokens of the row that left"
        );
        assert_eq!(got_greedy, want_greedy, "process {mine}");
    }
}

#[test]
fn a_lost_process_ends_all_that_is_under_way() {
    for (processes, lost) in [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)] {
        let trouble = Trouble { lost_at: Some((lost, 40)), ..Trouble::default() };
        let all = together(("llama", 3), processes, trouble, &Arc::default(), |model| {
            let mut engine = Engine::new(SETTINGS);
            let asked = |row| submit(&mut engine, request(&model, &text(20, row), 500, rules()));
            let heard: Vec<Heard> = (0..3).map(asked).collect();
            for _ in 0..STEPS {
                if engine.lost().is_some() {
                    break;
                }
                engine.step();
            }
            let counts = engine.counts();
            assert!(counts.running == 0 && counts.most_passes == processes, "{counts:?}");
            assert!(engine.is_idle() && engine.lost().is_some());
            heard.iter().map(|heard| (heard.tokens().len(), heard.end())).collect::<Vec<_>>()
        });
        for (tokens, end) in all.into_iter().flatten() {
            assert!(tokens > 0 && tokens < 500, "{tokens} tokens");
            let Some(EngineEnd::Failed(why)) = end else { panic!("{end:?}") };
            assert!(why.starts_with("layers are on other processes: "), "{why}");
        }
    }
}

#[test]
fn nothing_is_left_on_the_lines_of_an_engine_that_is_drained() {
    let (family, layers) = ("llama", 3);
    let (want, _) = answers(&Arc::new(load(family, None)), SETTINGS, 3, 0);
    for steps in 1..=12 {
        let all = together((family, layers), 3, Trouble::default(), &Arc::default(), |model| {
            let mut engine = Engine::new(SETTINGS);
            let _heard = asked(&mut engine, &model, 5, 0);
            (0..steps).for_each(|_| engine.step());
            engine.drain();
            drop(engine);
            answers(&model, SETTINGS, 3, 0).0
        });
        assert!(all.iter().all(|got| *got == want), "{steps} steps");
    }
}

//! Several processes, threads here, that hold the layers of a model together and have several passes under way: the
//! answers have the bits of one process, no line between two of them holds more than it should, and nobody waits for
//! ever.

mod heard;
mod made;

use std::collections::VecDeque;
use std::error::Error;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use finetune_model::{
    ChosenToken, Engine, EngineEnd, EngineSettings, Generation, Hops, Model, Placement, RowRequest, Sampling, Stage,
    TokenRules,
};
use finetune_random::philox;

use heard::{DRAWN, Heard, SETTINGS, STEPS, finish, request, submit, text, with_adapter};

/// (golden model, its layers): rotary embeddings, experts with latent attention, convolutions, delta nets, norms of all
/// heads. In the third the processes have layers of different kinds.
const FAMILIES: [(&str, usize); 5] = [("llama", 3), ("deepseek_v3", 3), ("lfm2", 3), ("qwen3_5", 4), ("olmo3", 4)];

/// (tokens of the prompt, most tokens of the answer)
const ROWS: [(usize, usize); 5] = [(20, 30), (11, 12), (70, 25), (600, 9), (15, 40)];

/// How long a process waits until the test takes it to wait for ever.
const FOR_EVER: Duration = Duration::from_secs(60);

/// The longest delay of a message, in microseconds.
const LONGEST_DELAY: u32 = 2000;

/// What goes wrong on the lines of a process.
#[derive(Clone, Copy, Default)]
struct Trouble {
    /// Messages are held up for times that this seed says.
    delays: Option<u32>,
    /// The process and the number of messages after which it receives none.
    lost_at: Option<(usize, u32)>,
}

/// Lines of one process, which hold as many messages as there are processes.
struct Lines {
    mine: usize,
    to: Vec<SyncSender<Vec<u8>>>,
    from: Vec<Mutex<Receiver<Vec<u8>>>>,
    trouble: Trouble,
    /// Messages that were sent or received.
    messages: AtomicU32,
    seen: Arc<Mutex<Seen>>,
}

/// What the first process has sent.
#[derive(Default)]
struct Seen {
    /// The length of each message whose logits have not come yet.
    under_way: VecDeque<usize>,
    /// The most of them that were no longer than so many bytes.
    bound: usize,
    most_short: usize,
}

impl Lines {
    /// Counts a message and holds it up. Returns its number.
    fn hold_up(&self) -> u32 {
        let number = self.messages.fetch_add(1, Ordering::SeqCst);
        if let Some(seed) = self.trouble.delays {
            let [random, ..] = philox([number, self.mine as u32, 0, 0], [seed, 0]);
            std::thread::sleep(Duration::from_micros(u64::from(random % LONGEST_DELAY)));
        }
        number
    }
}

impl Hops for Lines {
    fn send(&self, to: usize, bytes: Vec<u8>) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.hold_up();
        if self.mine == 0 {
            let mut seen = self.seen.lock().expect("no panic");
            seen.under_way.push_back(bytes.len());
            let short = seen.under_way.iter().filter(|length| **length <= seen.bound).count();
            seen.most_short = seen.most_short.max(short);
        }
        // A line that is full is an error, not a wait.
        Ok(self.to[to].try_send(bytes)?)
    }

    fn receive(&self, from: usize, length: usize) -> Result<Vec<u8>, Box<dyn Error + Send + Sync>> {
        let number = self.hold_up();
        if self.trouble.lost_at.is_some_and(|(process, at)| process == self.mine && number >= at) {
            return Err("the other process is lost".into());
        }
        let bytes = self.from[from].lock().expect("no panic").recv_timeout(FOR_EVER)?;
        if self.mine == 0 {
            self.seen.lock().expect("no panic").under_way.pop_front();
        }
        assert_eq!(bytes.len(), length);
        Ok(bytes)
    }
}

/// The lines of each of so many processes.
fn lines(processes: usize, trouble: Trouble, seen: &Arc<Mutex<Seen>>) -> Vec<Lines> {
    let mut all: Vec<Lines> = (0..processes)
        .map(|mine| {
            let (to, from, messages) = (Vec::new(), Vec::new(), AtomicU32::new(0));
            Lines { mine, to, from, trouble, messages, seen: Arc::clone(seen) }
        })
        .collect();
    let pairs = (0..processes).flat_map(|from| (0..processes).map(move |to| (from, to)));
    for (from, to) in pairs {
        let (sender, receiver) = sync_channel(processes);
        all[from].to.push(sender);
        all[to].from.push(Mutex::new(receiver));
    }
    all
}

fn load(family: &str, stage: Option<Stage>) -> Model {
    let placement = Placement::cpu(None).with_stage(stage);
    let mut model = Model::load(&made::golden(family), &placement).expect("the model loads");
    model.config.max_position_embeddings = 8192;
    model
}

/// What each of so many processes makes of its part of a model.
fn together<R: Send>(
    (family, layers): (&str, usize),
    processes: usize,
    trouble: Trouble,
    seen: &Arc<Mutex<Seen>>,
    work: impl Fn(Arc<Model>) -> R + Sync,
) -> Vec<R> {
    let work = &work;
    std::thread::scope(|scope| {
        let process = |(mine, lines): (usize, Lines)| {
            scope.spawn(move || {
                let mut model = load(family, Some(Stage::contiguous(layers, processes, mine)));
                model.connect(Arc::new(lines));
                // A process that waits for another holds up none of the other's threads.
                let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().expect("threads");
                pool.install(|| work(Arc::new(model)))
            })
        };
        let all: Vec<_> = lines(processes, trouble, seen).into_iter().enumerate().map(process).collect();
        all.into_iter().map(|process| process.join().expect("answers")).collect()
    })
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

/// Processes and messages of any speed: the lines of [`Lines`] are bounded, and a process that waits for a minute
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

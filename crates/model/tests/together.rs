//! Several processes, threads here, that hold the layers of one model together: they answer with the bits of
//! one, each with a cache of its own layers.

#[path = "../../trainer/tests/common/deeper.rs"]
mod deeper;
mod made;

use std::error::Error;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use finetune_model::adapter::Adapter;
use finetune_model::{
    ChosenToken, Engine, EngineEvent, EngineRequest, EngineSettings, Generation, Hops, Listener, Model, Placement,
    RowRequest, Sampling, Stage, TokenRules,
};

/// Latent attention in layers of all kinds, keys and values beside it, windows, sinks, experts, states, and norms of all
/// heads.
const FAMILIES: [&str; 19] = [
    "deepseek_v3",
    "deepseek_v3_plain",
    "gemma2",
    "gemma3",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt_oss",
    "granite",
    "lfm2",
    "lfm2_moe",
    "llama",
    "ministral3",
    "olmo3",
    "phi3",
    "qwen3",
    "qwen3_5",
    "qwen3_moe",
    "smollm3",
];

const DRAWN: Sampling = Sampling { temperature: 1.3, top_p: 0.95, seed: 11 };

const SETTINGS: EngineSettings =
    EngineSettings { slots: 16, queue: 16, cache_bytes: 1 << 30, prefix_bytes: 64 << 20, speculate: 0 };

/// Tokens of the prompts. The last one begins as the one before, whose first part is known then.
const PROMPTS: [usize; 5] = [1, 20, 64, 600, 700];

type Lines = Vec<(Sender<Vec<u8>>, Mutex<Receiver<Vec<u8>>>)>;

/// A line to each process, and one from it.
struct Threads(Lines);

impl Hops for Threads {
    fn send(&self, to: usize, bytes: Vec<u8>) -> Result<(), Box<dyn Error + Send + Sync>> {
        Ok(self.0[to].0.send(bytes)?)
    }

    fn receive(&self, from: usize, length: usize) -> Result<Vec<u8>, Box<dyn Error + Send + Sync>> {
        let bytes = self.0[from].1.lock().expect("no panic").recv()?;
        assert_eq!(bytes.len(), length);
        Ok(bytes)
    }
}

/// The lines of each of so many processes.
#[expect(clippy::needless_range_loop, reason = "a line has two ends, in two lists")]
fn lines(processes: usize) -> Vec<Lines> {
    let mut all: Vec<Vec<_>> = (0..processes).map(|_| (0..processes).map(|_| (None, None)).collect()).collect();
    for from in 0..processes {
        for to in 0..processes {
            let (sender, receiver) = channel();
            all[from][to].0 = Some(sender);
            all[to][from].1 = Some(Mutex::new(receiver));
        }
    }
    let whole = |(sender, receiver): (Option<_>, Option<_>)| (sender.expect("a line"), receiver.expect("a line"));
    all.into_iter().map(|lines| lines.into_iter().map(whole).collect()).collect()
}

/// A model, with the adapter if that is made for so many layers.
fn load(directory: &Path, stage: Option<Stage>) -> Model {
    let mut model = Model::load(directory, &Placement::cpu(None).with_stage(stage)).expect("the model loads");
    if directory.join("adapter").is_dir() {
        let adapter = Adapter::read(&directory.join("adapter"), &model.config).expect("the adapter loads");
        model.attach(&adapter).expect("attached");
    }
    model.config.max_position_embeddings = 8192;
    model
}

/// Tokens that say nothing: 3, 10, 17, ...
fn text(length: usize) -> Vec<u32> {
    (0..length as u32).map(|n| (3 + 7 * n) % 96).collect()
}

#[derive(Clone, Default)]
struct Heard(Arc<Mutex<Vec<ChosenToken>>>);

impl Listener for Heard {
    fn hear(&mut self, event: EngineEvent) -> bool {
        if let EngineEvent::Token(chosen) = event {
            self.0.lock().expect("no panic").push(chosen);
        }
        true
    }

    fn is_gone(&self) -> bool {
        false
    }
}

/// Rows at once, and what an engine says, with the logarithms of probabilities.
fn answers(model: Model) -> (Vec<Generation>, Vec<Vec<ChosenToken>>) {
    let prompts = PROMPTS.map(text);
    let request = |prompt| RowRequest { prompt, max_new_tokens: 12, sampling: DRAWN, end_ids: &[] };
    let requests: Vec<RowRequest<'_>> = prompts.iter().map(|prompt| request(prompt)).collect();
    let rows = model.generate_rows(&requests, &mut |_, _| true).expect("answers");
    let (model, mut engine) = (Arc::new(model), Engine::new(SETTINGS));
    let rules = TokenRules { logprobs: Some(5), ..TokenRules::from(DRAWN) };
    let heard = prompts.map(|prompt| {
        let (model, rules, heard) = (Arc::clone(&model), rules.clone(), Heard::default());
        let asked = EngineRequest { model, prompt, max_new_tokens: 12, rules, form: None, end_ids: Vec::new() };
        engine.submit(asked, Box::new(heard.clone())).expect("taken");
        // The first two are under way before the others are asked.
        (0..2).for_each(|_| engine.step());
        heard
    });
    while !engine.is_idle() {
        engine.step();
    }
    (rows, heard.map(|heard| heard.0.lock().expect("no panic").clone()).into())
}

/// With the golden adapters, and with as many layers as processes without any.
#[test]
fn processes_that_hold_a_model_together_answer_as_one() {
    for family in FAMILIES {
        answer_as_one(family, &made::golden(family), &[1, 2]);
        let (_made, of_four) = deeper::at_least(&made::golden(family), 4);
        answer_as_one(family, &of_four, &[3, 4]);
    }
}

/// So many processes that hold this model together answer as one does.
fn answer_as_one(family: &str, directory: &Path, numbers: &[usize]) {
    let alone = answers(load(directory, None));
    assert!(alone.1.iter().all(|chosen| chosen.len() == 12), "{family}");
    let layers = load(directory, None).config.layers.len();
    for &processes in numbers {
        let together: Vec<_> = std::thread::scope(|scope| {
            let process = |(mine, lines): (usize, Lines)| {
                scope.spawn(move || {
                    let mut model = load(directory, Some(Stage::contiguous(layers, processes, mine)));
                    model.connect(Arc::new(Threads(lines)));
                    // A process that waits for another holds up none of the other's threads.
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().expect("threads");
                    pool.install(|| answers(model))
                })
            };
            let all: Vec<_> = lines(processes).into_iter().enumerate().map(process).collect();
            all.into_iter().map(|process| process.join().expect("answers")).collect()
        });
        for (mine, got) in together.iter().enumerate() {
            assert!(*got == alone, "{family}: {mine} of {processes} processes");
        }
    }
}

/// A base and an adapter on it, connected if it is one of several processes.
fn base_and_adapter(family: &str, stage: Option<Stage>, lines: Option<Lines>) -> [Arc<Model>; 2] {
    let directory = made::golden(family);
    let mut base = Model::load(&directory, &Placement::cpu(None).with_stage(stage)).expect("the model loads");
    base.config.max_position_embeddings = 8192;
    if let Some(lines) = lines {
        base.connect(Arc::new(Threads(lines)));
    }
    let adapter = Adapter::read(&directory.join("adapter"), &base.config).expect("the adapter loads");
    let mut adapted = base.clone();
    adapted.attach(&adapter).expect("attached");
    [base, adapted].map(Arc::new)
}

/// What an engine says to requests of both, and how many passes they shared.
fn mixed_answers(models: &[Arc<Model>; 2]) -> (Vec<Vec<ChosenToken>>, u64) {
    let mut engine = Engine::new(SETTINGS);
    let rules = TokenRules { logprobs: Some(5), ..TokenRules::from(DRAWN) };
    let heard: Vec<Heard> = [80, 90, 20, 600, 70, 1]
        .into_iter()
        .enumerate()
        .map(|(n, length)| {
            // Also in two groups there are requests of both in each: 0 1 1 0 0 1.
            let model = Arc::clone(&models[n.div_ceil(2) % 2]);
            let (rules, heard) = (rules.clone(), Heard::default());
            let prompt = text(length);
            let asked = EngineRequest { model, prompt, max_new_tokens: 12, rules, form: None, end_ids: Vec::new() };
            engine.submit(asked, Box::new(heard.clone())).expect("taken");
            heard
        })
        .collect();
    while !engine.is_idle() {
        engine.step();
    }
    let chosen = heard.into_iter().map(|heard| heard.0.lock().expect("no panic").clone()).collect();
    (chosen, engine.counts().passes.mixed_passes)
}

/// Requests with and without an adapter share passes over processes as in one.
#[test]
fn adapters_share_passes_over_processes() {
    for family in ["llama", "deepseek_v3"] {
        let alone = mixed_answers(&base_and_adapter(family, None, None));
        assert!(alone.1 > 0 && alone.0.iter().all(|chosen| chosen.len() == 12), "{family}");
        let layers = base_and_adapter(family, None, None)[0].config.layers.len();
        let together: Vec<_> = std::thread::scope(|scope| {
            let process = |(mine, lines): (usize, Lines)| {
                scope.spawn(move || {
                    let models = base_and_adapter(family, Some(Stage::contiguous(layers, 2, mine)), Some(lines));
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().expect("threads");
                    pool.install(|| mixed_answers(&models))
                })
            };
            let all: Vec<_> = lines(2).into_iter().enumerate().map(process).collect();
            all.into_iter().map(|process| process.join().expect("answers")).collect()
        });
        // Two passes at a time are of other groups than one, and both processes have the same.
        assert!(together.iter().all(|got| got.0 == alone.0 && got.1 > 0), "{family}");
        assert_eq!(together[0].1, together[1].1, "{family}");
    }
}

//! Several processes, threads here, that hold the layers of a golden model together, and the lines between them.

use std::collections::VecDeque;
use std::error::Error;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use finetune_model::{Hops, Model, Placement, Stage};
use finetune_random::philox;

use crate::made;

/// How long a process waits until the test takes it to wait for ever.
const FOR_EVER: Duration = Duration::from_secs(60);

/// The longest delay of a message, in microseconds.
const LONGEST_DELAY: u32 = 2000;

/// What goes wrong on the lines of a process.
#[derive(Clone, Copy, Default)]
pub(crate) struct Trouble {
    /// Messages are held up for times that this seed says.
    pub(crate) delays: Option<u32>,
    /// The process and the number of messages after which it receives none.
    pub(crate) lost_at: Option<(usize, u32)>,
    /// Messages that a line may hold beyond one for each process.
    pub(crate) room: usize,
}

/// Lines of one process, which hold as many messages as there are processes, and those of [`Trouble::room`].
struct Lines {
    mine: usize,
    to: Vec<SyncSender<Vec<u8>>>,
    from: Vec<Mutex<Receiver<Vec<u8>>>>,
    trouble: Trouble,
    /// Messages that were sent or received.
    messages: AtomicU32,
    seen: Arc<Mutex<Seen>>,
}

/// What the first process has sent and heard.
#[derive(Default)]
pub(crate) struct Seen {
    /// The length of each message whose tokens have not come yet.
    pub(crate) under_way: VecDeque<usize>,
    /// The most of them that were no longer than so many bytes.
    pub(crate) bound: usize,
    pub(crate) most_short: usize,
    /// Bytes of the longest message that has come.
    pub(crate) longest_heard: usize,
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
            let mut seen = self.seen.lock().expect("no panic");
            seen.under_way.pop_front();
            seen.longest_heard = seen.longest_heard.max(length);
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
        let (sender, receiver) = sync_channel(processes + trouble.room);
        all[from].to.push(sender);
        all[to].from.push(Mutex::new(receiver));
    }
    all
}

pub(crate) fn load(family: &str, stage: Option<Stage>) -> Model {
    let placement = Placement::cpu(None).with_stage(stage);
    let mut model = Model::load(&made::golden(family), &placement).expect("the model loads");
    model.config.max_position_embeddings = 8192;
    model
}

/// What each of so many processes makes of its part of a model: as many layers as any other has.
pub(crate) fn together<R: Send>(
    (family, layers): (&str, usize),
    processes: usize,
    trouble: Trouble,
    seen: &Arc<Mutex<Seen>>,
    work: impl Fn(Arc<Model>) -> R + Sync,
) -> Vec<R> {
    together_of(family, &Stage::contiguous(layers, processes, 0).counts(), trouble, seen, work)
}

/// What processes with so many layers each make of their parts of a model.
pub(crate) fn together_of<R: Send>(
    family: &str,
    counts: &[usize],
    trouble: Trouble,
    seen: &Arc<Mutex<Seen>>,
    work: impl Fn(Arc<Model>) -> R + Sync,
) -> Vec<R> {
    let work = &work;
    std::thread::scope(|scope| {
        let process = |(mine, lines): (usize, Lines)| {
            scope.spawn(move || {
                let mut model = load(family, Some(Stage::in_order(counts, mine)));
                model.connect(Arc::new(lines));
                // A process that waits for another holds up none of the other's threads.
                let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().expect("threads");
                pool.install(|| work(Arc::new(model)))
            })
        };
        let all: Vec<_> = lines(counts.len(), trouble, seen).into_iter().enumerate().map(process).collect();
        all.into_iter().map(|process| process.join().expect("answers")).collect()
    })
}

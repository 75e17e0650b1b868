//! The pipes to a worker, and the thread that reads them.

use std::io::{Read, Write};
use std::process::ChildStdin;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Event;
use crate::lines::Lines;
use crate::session::{Greeting, Opened, begin};

/// The command on another host, as far as it has come.
#[derive(Default)]
pub(super) struct Opening {
    /// It has said that it is there, and was told to begin.
    pub(super) begun: bool,
    pub(super) process: Option<u32>,
    /// It has a terminal, which would show what it is sent.
    pub(super) terminal: bool,
    /// What its login has printed.
    pub(super) greeting: String,
}

/// The standard input of a worker. It stays open: the worker ends when it does.
pub(super) struct Line {
    pub(super) stdin: Option<ChildStdin>,
    /// None: a worker of this host, which has begun.
    pub(super) opening: Option<Opening>,
}

impl Line {
    pub(super) fn say(&mut self, text: &str) {
        if let Some(stdin) = &mut self.stdin {
            // Ignore the error: the worker has ended.
            let _ = stdin.write_all(text.as_bytes()).and_then(|()| stdin.flush());
        }
    }

    pub(super) fn has_begun(&self) -> bool {
        self.opening.as_ref().is_none_or(|opening| opening.begun)
    }
}

pub(super) fn locked(line: &Mutex<Line>) -> MutexGuard<'_, Line> {
    line.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What reads the outputs of a worker.
pub(super) struct Ear {
    pub(super) rank: usize,
    pub(super) to: SyncSender<(usize, Event)>,
    pub(super) line: Arc<Mutex<Line>>,
    pub(super) mark: String,
    pub(super) assignment: String,
}

impl Ear {
    pub(super) fn listen(self, stdout: impl Read + Send + 'static, stderr: impl Read + Send + 'static) {
        let (rank, to) = (self.rank, self.to.clone());
        let complaining = std::thread::spawn(move || {
            read_lines(stderr, &mut |line| drop(to.send((rank, Event::ErrorLine(line)))));
        });
        std::thread::spawn(move || {
            self.hear(stdout);
            let _ = complaining.join();
            let _ = self.to.send((self.rank, Event::Closed));
        });
    }

    /// Waits until the command is there, tells it to begin, and passes its lines on.
    fn hear(&self, mut stdout: impl Read) {
        let mut say = |line| drop(self.to.send((self.rank, Event::Line(line))));
        if locked(&self.line).has_begun() {
            return read_lines(stdout, &mut say);
        }
        let (mut greeting, mut bytes) = (Greeting::new(&self.mark), vec![0; 16 << 10]);
        let rest = loop {
            let Ok(count @ 1..) = stdout.read(&mut bytes) else { return };
            let found = greeting.push(&bytes[..count]);
            let mut line = locked(&self.line);
            let Some(opening) = &mut line.opening else { return };
            match found {
                None => opening.greeting = greeting.text(),
                Some((Opened::Terminal, _)) => {
                    opening.terminal = true;
                    return;
                }
                Some((Opened::Ready { process }, rest)) => {
                    (opening.begun, opening.process) = (true, Some(process));
                    line.say(&format!("{}{}", begin(&self.mark), self.assignment));
                    break rest;
                }
            }
        };
        let mut lines = Lines::default();
        lines.push(&rest, &mut say);
        pass_lines(lines, stdout, &mut say);
    }
}

fn read_lines(pipe: impl Read, say: &mut dyn FnMut(String)) {
    pass_lines(Lines::default(), pipe, say);
}

fn pass_lines(mut lines: Lines, mut pipe: impl Read, say: &mut dyn FnMut(String)) {
    let mut bytes = vec![0; 64 << 10];
    while let Ok(count @ 1..) = pipe.read(&mut bytes) {
        lines.push(&bytes[..count], say);
    }
    lines.finish(say);
}

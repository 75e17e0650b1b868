//! `finetune`: fine-tunes language models with LoRA on the machine at hand.
//!
//! Owns: the commands, how errors, hints and progress look. Knows no maths.
//! Start reading at [`cli`], then the command of interest in `commands/`.

mod allocator;
mod cli;
mod closing;
mod commands;
mod copied_run;
mod disk_waits;
mod end_command;
mod exit;
mod failure;
mod flight;
mod given_recipe;
mod hosts;
mod http;
mod hub_files;
mod interrupt;
mod membership;
mod memory;
mod output;
mod overflow;
mod progress;
mod prometheus;
mod rank_event;
mod row_text;
mod signals;
mod size;
mod sleep_inhibitor;
mod source;
mod stderr;
mod text_table;
mod transfer;
mod version;
mod work;

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use exit::Exit;
use failure::Failure;

#[global_allocator]
static ALLOCATOR: allocator::Allocator = allocator::Allocator;

/// A thread could not be started. Libraries answer that with a panic.
static NO_THREADS: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    allocator::keep_freed_memory();
    allocator::prepare_limit(memory::limit_hint());
    signals::ignore_file_size_limit();
    overflow::listen();
    let cli = cli::parse();
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let message = panic.payload_as_str().unwrap_or_default();
        if says_no_threads(message) {
            NO_THREADS.store(true, Ordering::SeqCst);
        } else if !finetune_model::note_panic(message) {
            usual(panic);
        }
    }));
    // A panic is a bug of ours, never an answer to bad input: it has an exit code of its own.
    match std::panic::catch_unwind(|| commands::run(cli)) {
        Ok(Ok(code)) => code,
        Ok(Err(failure)) => {
            failure.print();
            failure.exit().into()
        }
        Err(_) if NO_THREADS.load(Ordering::SeqCst) => {
            let failure = Failure::no_threads();
            failure.print();
            failure.exit().into()
        }
        Err(_) => {
            stderr::complain!(
                "error: this is a bug in finetune {}; the lines above say where",
                env!("CARGO_PKG_VERSION")
            );
            Exit::Bug.into()
        }
    }
}

/// Whether a panic is one of `std::thread::spawn` or of rayon's pool for want of threads.
fn says_no_threads(message: &str) -> bool {
    let about_threads = message.contains("failed to spawn thread") || message.contains("ThreadPoolBuildError");
    about_threads && (message.contains("WouldBlock") || message.contains("OutOfMemory"))
}

#[cfg(test)]
mod tests {
    use super::says_no_threads;

    #[test]
    fn the_words_of_a_system_without_threads() {
        for (message, expected) in [
            (
                r#"failed to spawn thread: Os { code: 11, kind: WouldBlock, message: "Resource temporarily unavailable" }"#,
                true,
            ),
            (
                r#"The global thread pool has not been initialized.: ThreadPoolBuildError { kind: IOError(Os { code: 11, kind: WouldBlock, message: "" }) }"#,
                true,
            ),
            ("index out of bounds", false),
            ("read: Os { code: 11, kind: WouldBlock }", false),
        ] {
            assert_eq!(says_no_threads(message), expected, "{message}");
        }
    }
}

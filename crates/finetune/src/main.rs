//! `finetune`: fine-tunes language models with LoRA on the machine at hand.
//!
//! Owns: the commands, how errors, hints and progress look. Knows no maths.
//! Start reading at [`cli`], then the command of interest in `commands/`.

mod allocator;
mod cli;
mod commands;
mod failure;
mod freight;
mod hosts;
mod memory;
mod output;
mod progress;
mod prometheus;
mod seat;
mod signals;
mod told;
mod wake;

use std::process::ExitCode;

use clap::Parser;

#[global_allocator]
static ALLOCATOR: allocator::Allocator = allocator::Allocator;

fn main() -> ExitCode {
    allocator::keep_freed_memory();
    let cli = cli::Cli::parse();
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let message = panic.payload_as_str().unwrap_or_default();
        if !finetune_model::note_panic(message) {
            usual(panic);
        }
    }));
    // A panic is a bug of ours, never an answer to bad input: it has an exit code of its own.
    match std::panic::catch_unwind(|| commands::run(cli)) {
        Ok(Ok(code)) => code,
        Ok(Err(failure)) => {
            failure.print();
            failure.exit_code()
        }
        Err(_) => {
            anstream::eprintln!(
                "error: this is a bug in finetune {}; the lines above say where",
                env!("CARGO_PKG_VERSION")
            );
            ExitCode::from(1)
        }
    }
}

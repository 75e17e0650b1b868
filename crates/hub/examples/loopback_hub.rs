//! A Hugging Face hub on loopback, with the repositories of a directory, for other programs' tests:
//!
//! ```text
//! cargo run --release -p finetune-hub --example loopback_hub -- DIR [TOKEN]
//! ```
//!
//! `DIR` has `models/OWNER/NAME/…` and `datasets/OWNER/NAME/…`. The address is printed. The server
//! ends when its standard input does.

#[path = "../tests/loopback/mod.rs"]
mod loopback;

use std::path::Path;

use loopback::{Loopback, Store};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some(directory) = arguments.first() else {
        eprintln!("loopback_hub DIR [TOKEN]");
        std::process::exit(2);
    };
    let mut store = Store::read(Path::new(directory));
    store.token = arguments.get(1).cloned();
    let server = Loopback::start(store);
    println!("{}", server.endpoint());
    let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
}

//! What a stranger says to rank 0 while it waits for rank 1: without the token, nothing ends the
//! wait.
//!
//! Each input is one connection to a real listener, so this target is slower than the others.
#![no_main]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::OnceLock;
use std::thread::JoinHandle;
use std::time::Duration;

use finetune_allreduce::{Config, Group, Secret, new_token};
use libfuzzer_sys::fuzz_target;

/// The address of rank 0, and the thread that waits there.
static RANK_0: OnceLock<(String, JoinHandle<()>)> = OnceLock::new();

fn start() -> (String, JoinHandle<()>) {
    let free = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = free.local_addr().expect("its address").to_string();
    drop(free);
    let token = new_token().expect("random numbers");
    let secret = Secret::from_token(&token).expect("a token");
    let mut config = Config::new(0, 2, address.clone(), secret);
    config.join_timeout = Duration::from_secs(1 << 20);
    let waiting = std::thread::spawn(move || drop(Group::join(&config)));
    while TcpStream::connect(&address).is_err() {
        assert!(!waiting.is_finished(), "rank 0 does not listen");
        std::thread::sleep(Duration::from_millis(10));
    }
    (address, waiting)
}

fuzz_target!(|said: &[u8]| {
    let (address, waiting) = RANK_0.get_or_init(start);
    let mut connection = TcpStream::connect(address).expect("rank 0 takes connections");
    connection.set_read_timeout(Some(Duration::from_secs(10))).expect("a socket option");
    // It may hang up before all is said.
    let _ = connection.write_all(said).and_then(|()| connection.shutdown(Shutdown::Write));
    let _ = connection.read_to_end(&mut Vec::new());
    assert!(!waiting.is_finished(), "a stranger has ended the wait");
});

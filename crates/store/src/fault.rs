//! A disk in memory that can fail, or lose power, at any call. It is for the tests of this crate
//! and of those that save through it.
//!
//! It keeps what is synced apart from what is pending, as a file system does. After a power cut
//! ([`FaultDisk::after_crash`]) everything synced is there, and a seeded subset of the pending
//! changes, in any combination. An entry may be there without the one made before it. A file may be
//! empty, be cut or end in zeros. A rename within one directory is one change, as in POSIX and
//! journaled file systems.

use std::io;
use std::path::Path;
use std::sync::{Mutex, MutexGuard};

use crate::disk::Disk;

mod rng;
mod survival;
mod tree;

use rng::SplitMix64;
use survival::{Survival, survivor};
use tree::{Node, Tree, apply, empty_directory, sync};

/// What the disk does at the chosen changing call.
#[derive(Debug, Clone, Copy)]
enum Fault {
    /// The call may take effect. Nothing works from then on.
    PowerCut,
    /// The call fails without taking effect, but for a write, which leaves half. Later calls work.
    Error(io::ErrorKind),
}

#[derive(Debug, Clone)]
struct State {
    tree: Tree,
    calls: u64,
    fault: Option<(u64, Fault)>,
    fired: bool,
    is_off: bool,
    /// The file system cannot exchange two names.
    no_exchange: bool,
}

/// A disk in memory (see the module's documentation). Paths are absolute, and `/` exists.
#[derive(Debug)]
pub struct FaultDisk {
    state: Mutex<State>,
}

impl Default for FaultDisk {
    fn default() -> Self {
        Self::new()
    }
}

impl Clone for FaultDisk {
    fn clone(&self) -> Self {
        Self { state: Mutex::new(self.lock().clone()) }
    }
}

impl FaultDisk {
    /// An empty disk.
    pub fn new() -> Self {
        Self::with_nodes(vec![empty_directory()])
    }

    /// A disk whose file system cannot exchange two names in one step.
    pub fn without_exchange() -> Self {
        let disk = Self::new();
        disk.lock().no_exchange = true;
        disk
    }

    fn with_nodes(nodes: Vec<Node>) -> Self {
        let tree = Tree { nodes };
        Self {
            state: Mutex::new(State { tree, calls: 0, fault: None, fired: false, is_off: false, no_exchange: false }),
        }
    }

    /// The power goes at the `call`-th changing call from now, counted from 1.
    pub fn crash_at(&self, call: u64) {
        self.arm(call, Fault::PowerCut);
    }

    /// The `call`-th changing call from now, counted from 1, fails with this error.
    pub fn fail_at(&self, call: u64, kind: io::ErrorKind) {
        self.arm(call, Fault::Error(kind));
    }

    fn arm(&self, call: u64, fault: Fault) {
        let mut state = self.lock();
        (state.calls, state.fired, state.fault) = (0, false, Some((call, fault)));
    }

    /// Whether the chosen call has come.
    pub fn fired(&self) -> bool {
        self.lock().fired
    }

    /// Changing calls since the fault was chosen.
    pub fn calls(&self) -> u64 {
        self.lock().calls
    }

    /// Everything pending becomes synced.
    pub fn settle(&self) {
        for node in &mut self.lock().tree.nodes {
            sync(node);
        }
    }

    /// The disk as it may be found when the power is back.
    pub fn after_crash(&self, seed: u64) -> FaultDisk {
        let mut random = SplitMix64(seed);
        let survival = Survival::draw(&mut random);
        let mut nodes = self.lock().tree.nodes.clone();
        for node in &mut nodes {
            match node {
                Node::File { bytes, synced } => {
                    if bytes != synced {
                        *bytes = survivor(bytes, synced, survival, &mut random);
                    }
                }
                Node::Directory { entries, synced, pending } => {
                    *entries = synced.clone();
                    for change in pending.iter().filter(|_| survival.keeps(&mut random)) {
                        apply(entries, change);
                    }
                }
            }
            sync(node);
        }
        let reborn = Self::with_nodes(nodes);
        reborn.lock().no_exchange = self.lock().no_exchange;
        reborn
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn running(&self) -> io::Result<MutexGuard<'_, State>> {
        let state = self.lock();
        if state.is_off { Err(power_is_off()) } else { Ok(state) }
    }

    /// One changing call. `failing` is what a call that fails with an error leaves behind.
    fn change(
        &self,
        takes_effect_in_power_cut: bool,
        effect: impl FnOnce(&mut State) -> io::Result<()>,
        failing: impl FnOnce(&mut State),
    ) -> io::Result<()> {
        let mut state = self.running()?;
        state.calls += 1;
        match state.fault {
            Some((call, fault)) if call == state.calls => {
                state.fired = true;
                match fault {
                    Fault::PowerCut => {
                        if takes_effect_in_power_cut {
                            let _ = effect(&mut state);
                        }
                        state.is_off = true;
                        Err(power_is_off())
                    }
                    Fault::Error(kind) => {
                        failing(&mut state);
                        Err(io::Error::from(kind))
                    }
                }
            }
            _ => effect(&mut state),
        }
    }
}

impl Disk for FaultDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.change(true, |state| state.tree.add(path, empty_directory()), |_| {})
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        let create = |state: &mut State| {
            let mut above: Vec<_> = path.ancestors().collect();
            above.reverse();
            for directory in above {
                if state.tree.find(directory).is_err() {
                    state.tree.add(directory, empty_directory())?;
                }
            }
            Ok(())
        };
        self.change(true, create, |_| {})
    }

    fn write_file(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let file = |bytes: &[u8]| Node::File { bytes: bytes.to_vec(), synced: Vec::new() };
        let half = &bytes[..bytes.len() / 2];
        self.change(
            true,
            |state| state.tree.add(path, file(bytes)),
            |state| {
                let _ = state.tree.add(path, file(half));
            },
        )
    }

    fn append_file(&self, path: &Path, more: &[u8]) -> io::Result<()> {
        let append = |state: &mut State, more: &[u8]| match state.tree.node(path)? {
            Node::File { bytes, .. } => {
                bytes.extend_from_slice(more);
                Ok(())
            }
            Node::Directory { .. } => Err(io::ErrorKind::IsADirectory.into()),
        };
        let half = &more[..more.len() / 2];
        self.change(
            true,
            |state| append(state, more),
            |state| {
                let _ = append(state, half);
            },
        )
    }

    fn sync_file(&self, path: &Path) -> io::Result<()> {
        self.change(false, |state| state.tree.node(path).map(sync), |_| {})
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.change(false, |state| state.tree.node(path).map(sync), |_| {})
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.change(true, |state| state.tree.rename(from, to), |_| {})
    }

    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()> {
        if self.lock().no_exchange {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.change(true, |state| state.tree.exchange(one, other), |_| {})
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.change(true, |state| state.tree.remove_tree(path), |_| {})
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.change(true, |state| state.tree.unlink(path), |_| {})
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        Ok(self.running()?.tree.find(path).is_ok())
    }

    fn is_directory(&self, path: &Path) -> io::Result<bool> {
        Ok(matches!(self.running()?.tree.node(path)?, Node::Directory { .. }))
    }

    fn length(&self, path: &Path) -> io::Result<u64> {
        Ok(self.read(path)?.len() as u64)
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        match self.running()?.tree.node(path)? {
            Node::File { bytes, .. } => Ok(bytes.clone()),
            Node::Directory { .. } => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn hash(&self, path: &Path) -> io::Result<[u8; 32]> {
        Ok(*blake3::hash(&self.read(path)?).as_bytes())
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        match self.running()?.tree.node(path)? {
            Node::Directory { entries, .. } => Ok(entries.keys().cloned().collect()),
            Node::File { .. } => Err(io::ErrorKind::NotADirectory.into()),
        }
    }
}

fn power_is_off() -> io::Error {
    io::Error::other("the power is off")
}

//! The program's allocator: mimalloc for small blocks, pages of our own for tensors.
//!
//! The tensors of a step are as large as those of the step before. Fresh pages have to be zeroed,
//! which was measured to cost a step 1.2 to 2 times its time. So freed pages are kept. mimalloc,
//! told to keep them, puts small tensors into large blocks and leaves the rest resident: a third of
//! the memory. Here a freed block is taken again only for a tensor that fills most of it. All
//! blocks together stay within an eighth of the most that was ever in use at once, and within the memory that the
//! process may have, if that is known: layers of unequal sizes that are read one after the other leave blocks that none
//! of the next ones takes.

use std::alloc::{GlobalAlloc, Layout};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use finetune_dataset::guard;
use finetune_trainer::ThisHost;
use mimalloc::MiMalloc;

use crate::exit::Exit;

/// Blocks from this size on are ours.
const LARGE: usize = 1 << 18;
/// Blocks are multiples of this: a page, on every system.
const GRAIN: usize = 1 << 14;
/// Bytes of the program, its threads and small pieces.
const BESIDE: usize = 48 << 20;
/// Addresses that are reserved at a time for blocks of up to a quarter of it: they follow each other in pages of
/// 2 MiB, which most of them are smaller than. One core reads up to a third faster from those (AMD EPYC).
const RESERVED: usize = 1 << 25;

pub(crate) struct Allocator;

/// Keeps no freed blocks that would bring this process beyond its share of the host's memory, less a part in 32 and
/// [`BESIDE`] for what is in no such block.
pub(crate) fn stay_within_share_of(host: &ThisHost) {
    let Some(bytes) = host.memory else { return };
    let share = usize::try_from(bytes).unwrap_or(usize::MAX) / host.local_world.max(1);
    blocks().most = share.saturating_sub(share / 32).saturating_sub(BESIDE);
}

/// Keeps freed pages of mimalloc's too.
#[expect(unsafe_code, reason = "mimalloc's options are a C function")]
pub(crate) fn keep_freed_memory() {
    /// `mi_option_purge_delay` of mimalloc.h, for which the Rust crate has no name.
    const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
    // SAFETY: the call stores an integer in a table. The tables of mimalloc 2 and 3 have a place
    // 15.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
}

/// The error of a process that cannot have more memory. It is put together before that happens:
/// later there is no memory for it.
static LAST_WORDS: OnceLock<String> = OnceLock::new();

/// Sets the hints that are printed if memory runs out.
pub(crate) fn prepare_last_words(hints: &[String]) {
    let hints: String = hints.iter().map(|hint| format!("hint: {hint}\n")).collect();
    let _ = LAST_WORDS
        .set(format!("error: the system gives this process no more memory; saved checkpoints are safe\n\n{hints}"));
}

/// A further hint, if the shell has limited this process. It is known from the start on.
static LIMIT: OnceLock<String> = OnceLock::new();

/// Sets the hint that is printed if memory runs out because of a limit.
pub(crate) fn prepare_limit(hint: Option<String>) {
    if let Some(hint) = hint {
        let _ = LIMIT.set(format!("hint: {hint}\n"));
    }
}

/// Large blocks, in use and kept.
struct Blocks {
    /// Address and length of each block in use.
    used: BTreeMap<usize, usize>,
    /// Length, age and address of each kept block.
    kept: BTreeSet<(usize, u64, usize)>,
    /// Address and length of each kept block, by its age.
    ages: BTreeMap<u64, (usize, usize)>,
    now: u64,
    used_bytes: usize,
    kept_bytes: usize,
    most_used: usize,
    /// Bytes of all blocks that no kept one goes beyond.
    most: usize,
    /// Address and length of what is reserved and not yet handed out. Nothing of it takes memory.
    reserved: (usize, usize),
}

// The maps' own nodes are small, so they come from mimalloc. No lock is taken twice.
static BLOCKS: Mutex<Blocks> = Mutex::new(Blocks::new());

fn blocks() -> MutexGuard<'static, Blocks> {
    BLOCKS.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Blocks {
    const fn new() -> Blocks {
        Blocks {
            used: BTreeMap::new(),
            kept: BTreeSet::new(),
            ages: BTreeMap::new(),
            now: 0,
            used_bytes: 0,
            kept_bytes: 0,
            most_used: 0,
            most: usize::MAX,
            reserved: (0, 0),
        }
    }

    /// A block of at least `size` bytes, and whether it is known to be zero. `None` if the system
    /// has no more.
    fn take(&mut self, size: usize) -> Option<(*mut u8, bool)> {
        let wanted = size.checked_next_multiple_of(GRAIN)?;
        let fitting = self.kept.range((wanted, 0, 0)..=(wanted + wanted / 4, u64::MAX, usize::MAX)).next().copied();
        let (address, length, fresh) = match fitting {
            Some((length, age, address)) => {
                self.forget(age);
                (address, length, false)
            }
            None => (self.fresh(wanted)?, wanted, true),
        };
        self.used.insert(address, length);
        self.used_bytes += length;
        self.most_used = self.most_used.max(self.used_bytes);
        Some((address as *mut u8, fresh))
    }

    /// New pages. Before that, old blocks go back to the system until all blocks together stay
    /// within the limit.
    fn fresh(&mut self, length: usize) -> Option<usize> {
        let most = self.most_used.max(self.used_bytes + length);
        let most = (most + most / 8).min(self.most);
        while self.used_bytes + self.kept_bytes + length > most && self.drop_oldest() {}
        loop {
            if let Some(address) = self.cut(length).or_else(|| pages::map(length)) {
                return Some(address);
            }
            if !self.drop_oldest() {
                return None;
            }
        }
    }

    /// New pages from what is reserved. `None`: they are too many, or the system reserves no more.
    fn cut(&mut self, length: usize) -> Option<usize> {
        if length > RESERVED / 4 {
            return None;
        }
        if self.reserved.1 < length {
            let address = pages::map(RESERVED)?;
            let (rest, unused) = std::mem::replace(&mut self.reserved, (address, RESERVED));
            if unused > 0 {
                pages::unmap(rest, unused);
            }
        }
        let (address, left) = self.reserved;
        self.reserved = (address + length, left - length);
        Some(address)
    }

    /// Takes a kept block off the lists.
    fn forget(&mut self, age: u64) -> Option<(usize, usize)> {
        let (address, length) = self.ages.remove(&age)?;
        self.kept.remove(&(length, age, address));
        self.kept_bytes -= length;
        Some((address, length))
    }

    /// Gives the block that was freed longest ago back to the system.
    fn drop_oldest(&mut self) -> bool {
        let Some(&age) = self.ages.keys().next() else { return false };
        if let Some((address, length)) = self.forget(age) {
            pages::unmap(address, length);
        }
        true
    }

    /// Keeps a freed block.
    fn keep(&mut self, address: usize) {
        let Some(length) = self.used.remove(&address) else { return };
        self.used_bytes -= length;
        self.kept_bytes += length;
        self.now += 1;
        self.kept.insert((length, self.now, address));
        self.ages.insert(self.now, (address, length));
    }
}

/// Pages from the system.
#[expect(unsafe_code, reason = "mmap, madvise and munmap are C functions")]
mod pages {
    /// Zeroed pages of this length.
    pub(super) fn map(length: usize) -> Option<usize> {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANON);
        // SAFETY: a new private mapping at no particular address touches nothing that is there.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, -1, 0) };
        if address == libc::MAP_FAILED {
            return None;
        }
        // A system without such pages says so, and gives small ones.
        #[cfg(target_os = "linux")]
        // SAFETY: the pages are those of the new mapping; nothing is in them.
        unsafe {
            libc::madvise(address, length, libc::MADV_HUGEPAGE)
        };
        Some(address as usize)
    }

    /// Gives back pages that came from [`map`] and are no longer in use.
    pub(super) fn unmap(address: usize, length: usize) {
        // SAFETY: the caller has taken the block off its lists, which had it from `map` with this
        // length.
        unsafe { libc::munmap(address as *mut libc::c_void, length) };
    }
}

fn is_large(layout: Layout) -> bool {
    layout.size() >= LARGE && layout.align() <= GRAIN
}

#[expect(unsafe_code, reason = "a global allocator hands out memory")]
// SAFETY: a large block has one owner at a time. From `take` to `keep` it is on the list of blocks
// in use, and on no other. It is as long as asked for and aligned to a page. Its layout alone says
// that it is large, so it is freed in the same way as it was taken. All other calls are mimalloc's,
// with the caller's own promises. No call returns null.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // Templates and tokenizers of others may use a share of the memory. They are held to it
        // before any lock is taken.
        guard::allocated(layout.size());
        if !is_large(layout) {
            // SAFETY: see above.
            return given(unsafe { MiMalloc.alloc(layout) });
        }
        let taken = blocks().take(layout.size());
        taken.map_or_else(|| out_of_memory(), |(block, _)| block)
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        guard::freed(layout.size());
        if is_large(layout) {
            blocks().keep(pointer as usize);
        } else {
            // SAFETY: see above.
            unsafe { MiMalloc.dealloc(pointer, layout) }
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        guard::allocated(layout.size());
        if !is_large(layout) {
            // SAFETY: see above.
            return given(unsafe { MiMalloc.alloc_zeroed(layout) });
        }
        let taken = blocks().take(layout.size());
        let (block, zero) = taken.unwrap_or_else(|| out_of_memory());
        if !zero {
            // SAFETY: the block has at least this length.
            unsafe { block.write_bytes(0, layout.size()) };
        }
        block
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller promises a size that makes a layout with the same alignment.
        let new = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        match (is_large(layout), is_large(new)) {
            (false, false) => {
                guard::allocated(size.saturating_sub(layout.size()));
                guard::freed(layout.size().saturating_sub(size));
                // SAFETY: see above.
                given(unsafe { MiMalloc.realloc(pointer, layout, size) })
            }
            (true, true) if blocks().used.get(&(pointer as usize)).is_some_and(|&length| size <= length) => {
                guard::freed(layout.size().saturating_sub(size));
                guard::allocated(size.saturating_sub(layout.size()));
                pointer
            }
            _ => {
                // SAFETY: the old block is read up to the shorter of both lengths, and freed once.
                unsafe {
                    let block = self.alloc(new);
                    std::ptr::copy_nonoverlapping(pointer, block, layout.size().min(size));
                    self.dealloc(pointer, layout);
                    block
                }
            }
        }
    }
}

fn given(pointer: *mut u8) -> *mut u8 {
    if pointer.is_null() {
        out_of_memory();
    }
    pointer
}

/// Prints what to do about it and ends the process, without allocating.
#[cold]
#[expect(unsafe_code, reason = "writes and exits without allocating")]
fn out_of_memory() -> ! {
    let words = LAST_WORDS.get().map_or("error: the system gives this process no more memory\n\n", String::as_str);
    let limit = LIMIT.get().map_or("", String::as_str);
    // SAFETY: the pointers and lengths are those of strings; `_exit` does not return.
    unsafe {
        libc::write(2, words.as_ptr().cast(), words.len());
        libc::write(2, limit.as_ptr().cast(), limit.len());
        libc::_exit(Exit::DiskOrMemory.number().into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same sizes take the same blocks again. Other sizes never make all blocks together more
    /// than an eighth too large.
    #[test]
    fn blocks_are_used_again_and_stay_within_an_eighth() {
        let mut blocks = Blocks::new();
        let step = |blocks: &mut Blocks, sizes: &[usize]| {
            let taken: Vec<_> = sizes.iter().map(|&size| blocks.take(size << 20).expect("memory")).collect();
            taken.iter().for_each(|(block, _)| blocks.keep(*block as usize));
            taken.iter().filter(|(_, fresh)| *fresh).count()
        };
        assert_eq!(step(&mut blocks, &[16, 44, 16]), 3);
        assert_eq!(step(&mut blocks, &[16, 44, 16]), 0);
        assert_eq!(step(&mut blocks, &[40, 14, 15]), 0, "most of a block is enough");
        assert_eq!(blocks.used_bytes, 0);
        assert_eq!(blocks.kept_bytes, 76 << 20);
        for size in 1..60 {
            step(&mut blocks, &[size, size / 2 + 1]);
            assert!(blocks.kept_bytes <= blocks.most_used + blocks.most_used / 8, "{size}: {}", blocks.kept_bytes);
        }
        while blocks.drop_oldest() {}
        assert!(blocks.kept.is_empty() && blocks.kept_bytes == 0);
    }

    /// What is in use may go beyond the limit, what is kept may not.
    #[test]
    fn what_is_kept_stays_within_the_memory() {
        let mut blocks = Blocks::new();
        blocks.most = 100 << 20;
        let layer = |blocks: &mut Blocks, sizes: &[usize]| -> Vec<usize> {
            let taken = sizes.iter().map(|&size| blocks.take(size << 20).expect("memory").0 as usize);
            taken.collect()
        };
        let whole = layer(&mut blocks, &[60, 30]);
        whole.into_iter().for_each(|block| blocks.keep(block));
        assert_eq!(blocks.kept_bytes, 90 << 20);
        // Without the limit, 101 MiB would stay: an eighth more than were in use at once.
        let other = layer(&mut blocks, &[11]);
        assert_eq!((blocks.used_bytes, blocks.kept_bytes), (11 << 20, 30 << 20));
        let more = layer(&mut blocks, &[95]);
        assert_eq!((blocks.used_bytes, blocks.kept_bytes), (106 << 20, 0));
        other.into_iter().chain(more).for_each(|block| blocks.keep(block));
        while blocks.drop_oldest() {}
    }

    /// Content survives growing and shrinking across the border between small and large. Zeroed
    /// memory is zero when it is used again.
    #[test]
    fn vectors_of_all_sizes_keep_their_content() {
        let mut values: Vec<u8> = Vec::new();
        for n in 0..3 * LARGE {
            values.push(n as u8);
        }
        values.truncate(LARGE / 2);
        values.shrink_to_fit();
        assert!(values.iter().enumerate().all(|(n, &value)| value == n as u8));
        for _ in 0..3 {
            let mut zeros = vec![0u64; LARGE / 4];
            assert!(zeros.iter().all(|&zero| zero == 0));
            zeros.fill(7);
        }
    }
}

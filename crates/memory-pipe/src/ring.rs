//! One direction of a pipe: a ring of bytes with one writer and one reader.
//!
//! Both count the bytes they have moved; the ring holds those between the two counts. Each count
//! has a cache line of its own, and each side remembers the other's count until that no longer
//! suffices, so that the lines seldom change hands.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

/// Bytes of the counts and flags of one direction.
pub(crate) const CONTROL_BYTES: usize = 256;

const WRITTEN: usize = 0;
const READ: usize = 64;
const READER_SLEEPS: usize = 128;
const WRITER_SLEEPS: usize = 192;

/// What [`Ring::read_in_place`] shows is cut at multiples of so many bytes: never within a number.
pub(crate) const CUT: usize = 8;

/// The other side's count is not possible: the memory was changed by somebody else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Damaged;

impl std::fmt::Display for Damaged {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("the memory shared with the peer is damaged")
    }
}

impl std::error::Error for Damaged {}

/// What one call moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// So many bytes.
    pub bytes: usize,
    /// The other side sleeps and waits for this.
    pub wake: bool,
}

/// One direction as one of its two sides sees it.
pub(crate) struct Ring {
    control: *mut u8,
    data: *mut u8,
    capacity: usize,
    /// Bytes that this side has moved so far.
    mine: u64,
    /// Bytes that the other side had moved when this one last looked.
    theirs: u64,
    /// Where a piece that lies around the end in an uneven way is put together.
    bounce: Vec<u8>,
}

// SAFETY: the pointers lead into a mapping that lives as long as the pipe that owns the ring; all
// that both sides touch at the same time is atomic.
unsafe impl Send for Ring {}

impl Ring {
    /// # Safety
    /// `control` has [`CONTROL_BYTES`], `data` `capacity` bytes, for as long as the ring lives;
    /// `control` is aligned to 8 bytes. Only one writer and one reader are made of the same memory.
    pub(crate) unsafe fn new(control: *mut u8, data: *mut u8, capacity: usize) -> Ring {
        Ring { control, data, capacity, mine: 0, theirs: 0, bounce: Vec::new() }
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    fn count(&self, at: usize) -> &AtomicU64 {
        // SAFETY: within the control block, and aligned.
        unsafe { AtomicU64::from_ptr(self.control.add(at).cast()) }
    }

    fn flag(&self, at: usize) -> &AtomicU32 {
        // SAFETY: within the control block, and aligned.
        unsafe { AtomicU32::from_ptr(self.control.add(at).cast()) }
    }

    /// Bytes that the writer can write now.
    fn free(&mut self, wanted: usize) -> Result<usize, Damaged> {
        let room = |ring: &Ring| ring.capacity as u64 - (ring.mine - ring.theirs);
        if room(self) < wanted as u64 {
            let theirs = self.count(READ).load(Ordering::Acquire);
            if theirs < self.theirs || theirs > self.mine {
                return Err(Damaged);
            }
            self.theirs = theirs;
        }
        Ok((room(self) as usize).min(wanted))
    }

    /// Bytes that the reader can read now.
    fn filled(&mut self, wanted: usize) -> Result<usize, Damaged> {
        if self.theirs - self.mine < wanted as u64 {
            let theirs = self.count(WRITTEN).load(Ordering::Acquire);
            if theirs < self.theirs || theirs - self.mine > self.capacity as u64 {
                return Err(Damaged);
            }
            self.theirs = theirs;
        }
        Ok(((self.theirs - self.mine) as usize).min(wanted))
    }

    /// Calls `copy` with the memory of the next `bytes` bytes: one piece, or two around the end.
    fn pieces(&self, bytes: usize, mut copy: impl FnMut(*mut u8, usize)) {
        let at = (self.mine % self.capacity as u64) as usize;
        let first = bytes.min(self.capacity - at);
        // SAFETY: `at` lies within the ring.
        copy(unsafe { self.data.add(at) }, first);
        if first < bytes {
            copy(self.data, bytes - first);
        }
    }

    pub(crate) fn write(&mut self, parts: &[&[u8]]) -> Result<Moved, Damaged> {
        let mut left = self.free(parts.iter().map(|part| part.len()).sum())?;
        let moved = left;
        for part in parts {
            let part = &part[..part.len().min(left)];
            let mut from = part;
            self.pieces(part.len(), |to, bytes| {
                let (piece, rest) = from.split_at(bytes);
                // SAFETY: `to` has room for `bytes` bytes, which the reader does not touch before
                // it sees them counted.
                unsafe { std::ptr::copy_nonoverlapping(piece.as_ptr(), to, bytes) };
                from = rest;
            });
            self.mine += part.len() as u64;
            left -= part.len();
        }
        Ok(self.published(moved, WRITTEN, READER_SLEEPS))
    }

    pub(crate) fn read(&mut self, parts: &mut [&mut [u8]]) -> Result<Moved, Damaged> {
        let mut left = self.filled(parts.iter().map(|part| part.len()).sum())?;
        let moved = left;
        for part in parts {
            let length = part.len().min(left);
            let mut filled = 0;
            self.pieces(length, |from, bytes| {
                let to = &mut part[filled..filled + bytes];
                // SAFETY: `from` has `bytes` bytes that the writer has counted and does not touch
                // before it sees them read.
                unsafe { std::ptr::copy_nonoverlapping(from.cast_const(), to.as_mut_ptr(), bytes) };
                filled += bytes;
            });
            self.mine += length as u64;
            left -= length;
        }
        Ok(self.published(moved, READ, WRITER_SLEEPS))
    }

    /// Calls `look` with the next `bytes` bytes where they lie, if all of them are there, and then
    /// counts them as read. They come in two parts, and are cut at a multiple of [`CUT`] bytes.
    pub(crate) fn read_in_place(&mut self, bytes: usize, look: impl FnOnce([&[u8]; 2])) -> Result<Moved, Damaged> {
        if self.filled(bytes)? < bytes {
            return Ok(Moved::default());
        }
        let mut parts: [&[u8]; 2] = [&[]; 2];
        let mut places = parts.iter_mut();
        self.pieces(bytes, |from, length| {
            // SAFETY: `from` has `length` bytes that the writer has counted and does not touch
            // before it sees them read, which it cannot before `look` is done.
            *places.next().expect("two pieces at most") = unsafe { std::slice::from_raw_parts(from, length) };
        });
        if parts[1].is_empty() || parts[0].len().is_multiple_of(CUT) {
            look(parts);
        } else {
            let mut whole = std::mem::take(&mut self.bounce);
            whole.clear();
            parts.iter().for_each(|part| whole.extend_from_slice(part));
            look([&whole, &[]]);
            self.bounce = whole;
        }
        self.mine += bytes as u64;
        Ok(self.published(bytes, READ, WRITER_SLEEPS))
    }

    /// Shows the other side this side's count, and looks whether it sleeps.
    fn published(&self, bytes: usize, count: usize, sleeper: usize) -> Moved {
        if bytes == 0 {
            return Moved::default();
        }
        self.count(count).store(self.mine, Ordering::Release);
        // The other side sets its flag and then looks at the count; this one sets the count and then
        // looks at the flag. One of the two sees the other.
        fence(Ordering::SeqCst);
        let flag = self.flag(sleeper);
        Moved { bytes, wake: flag.load(Ordering::Relaxed) == 1 && flag.swap(0, Ordering::Relaxed) == 1 }
    }

    /// The reader says that it sleeps until `bytes` bytes are there. Returns whether it must not:
    /// they are.
    pub(crate) fn reader_sleeps(&mut self, bytes: usize) -> bool {
        self.flag(READER_SLEEPS).store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.filled(bytes).map_or(true, |there| there == bytes)
    }

    /// The writer says that it sleeps. Returns whether it must not: there is room.
    pub(crate) fn writer_sleeps(&mut self) -> bool {
        self.flag(WRITER_SLEEPS).store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.free(1) != Ok(0)
    }

    pub(crate) fn reader_is_awake(&self) {
        self.flag(READER_SLEEPS).store(0, Ordering::Relaxed);
    }

    pub(crate) fn writer_is_awake(&self) {
        self.flag(WRITER_SLEEPS).store(0, Ordering::Relaxed);
    }
}

//! A pipe in both directions, and how the second process finds it.

use std::fs::File;
use std::io;

use memmap2::{MmapOptions, MmapRaw};

use crate::ring::{CONTROL_BYTES, Damaged, Moved, Ring};

/// Bytes of the number by which the second process knows that it opened the right memory.
pub const NONCE_BYTES: usize = 16;

/// Bytes before the rings' data: the counts of both, and the nonce.
const HEAD_BYTES: usize = 4096;
const NONCE_AT: usize = 1024;

/// Where another process of this machine finds the memory, while the first one holds the file open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// The process that made it.
    pub pid: u32,
    /// Its descriptor of the file.
    pub descriptor: i32,
    /// Bytes that each direction holds.
    pub capacity: usize,
    /// What is written into it.
    pub nonce: [u8; NONCE_BYTES],
}

/// One side of a pipe of bytes in both directions.
pub struct Pipe {
    outgoing: Ring,
    incoming: Ring,
    /// Keeps the memory that the rings point into.
    _map: MmapRaw,
}

impl Pipe {
    /// Makes the memory of a pipe with `capacity` bytes in each direction. The other process opens
    /// it with the offer while the file is open.
    ///
    /// # Errors
    /// If the system has no such memory (only Linux has).
    pub fn create(capacity: usize, nonce: [u8; NONCE_BYTES]) -> io::Result<(Pipe, Offer, File)> {
        let file = unnamed_file(HEAD_BYTES + 2 * capacity)?;
        let map = MmapOptions::new().len(HEAD_BYTES + 2 * capacity).map_raw(&file)?;
        // SAFETY: within the mapping, which nobody else has yet.
        unsafe { std::ptr::copy_nonoverlapping(nonce.as_ptr(), map.as_mut_ptr().add(NONCE_AT), NONCE_BYTES) };
        let offer = Offer { pid: std::process::id(), descriptor: descriptor(&file), capacity, nonce };
        Ok((Pipe::over(map, capacity, false), offer, file))
    }

    /// The other side of the pipe that another process made.
    ///
    /// # Errors
    /// If that process is not of this machine or of another user, or the memory is not what was
    /// offered.
    pub fn open(offer: &Offer) -> io::Result<Pipe> {
        let length = HEAD_BYTES + 2 * offer.capacity;
        let path = format!("/proc/{}/fd/{}", offer.pid, offer.descriptor);
        let foreign = || io::Error::new(io::ErrorKind::InvalidData, "it is not the memory that was offered");
        // Another machine's process of this number can have anything there: it is looked at before
        // it is opened.
        let found = std::fs::metadata(&path)?;
        if !found.is_file() || found.len() != length as u64 {
            return Err(foreign());
        }
        let file = File::options().read(true).write(true).open(&path)?;
        let map = MmapOptions::new().len(length).map_raw(&file)?;
        let mut nonce = [0; NONCE_BYTES];
        // SAFETY: within the mapping; the first process wrote it before it made the offer.
        unsafe { std::ptr::copy_nonoverlapping(map.as_ptr().add(NONCE_AT), nonce.as_mut_ptr(), NONCE_BYTES) };
        if nonce != offer.nonce || !is_sealed(&file) {
            return Err(foreign());
        }
        Ok(Pipe::over(map, offer.capacity, true))
    }

    fn over(map: MmapRaw, capacity: usize, second: bool) -> Pipe {
        let ring = |index: usize| {
            let base = map.as_mut_ptr();
            // SAFETY: both lie within the mapping, which the pipe keeps; the page is aligned. The
            // one side writes ring 0 and reads ring 1, the other the other way round.
            unsafe { Ring::new(base.add(index * CONTROL_BYTES), base.add(HEAD_BYTES + index * capacity), capacity) }
        };
        let (outgoing, incoming) = (ring(usize::from(second)), ring(usize::from(!second)));
        Pipe { outgoing, incoming, _map: map }
    }

    /// Writes what there is room for, one part after the other.
    ///
    /// # Errors
    /// If the memory is damaged.
    pub fn write(&mut self, parts: &[&[u8]]) -> Result<Moved, Damaged> {
        self.outgoing.write(parts)
    }

    /// Reads what is there, into one part after the other.
    ///
    /// # Errors
    /// If the memory is damaged.
    pub fn read(&mut self, parts: &mut [&mut [u8]]) -> Result<Moved, Damaged> {
        self.incoming.read(parts)
    }

    /// Calls `look` with the next `bytes` bytes where they lie, if all of them are there, and then
    /// counts them as read. They come in two parts: what lies before the end of the memory, a multiple
    /// of 8 bytes if anything follows, and what lies behind its start.
    ///
    /// # Errors
    /// If the memory is damaged.
    pub fn read_in_place(&mut self, bytes: usize, look: impl FnOnce([&[u8]; 2])) -> Result<Moved, Damaged> {
        self.incoming.read_in_place(bytes, look)
    }

    /// Bytes that each direction holds.
    pub fn capacity(&self) -> usize {
        self.incoming.capacity()
    }

    /// Says that this side sleeps until it can read so many bytes (0: it does not wait for any), or
    /// write, or either. Returns whether it must not, because it can now.
    pub fn sleep(&mut self, until_readable: usize, until_writable: bool) -> bool {
        let readable = until_readable > 0 && self.incoming.reader_sleeps(until_readable);
        let writable = until_writable && self.outgoing.writer_sleeps();
        readable || writable
    }

    /// Says that this side no longer sleeps.
    pub fn awake(&self) {
        self.incoming.reader_is_awake();
        self.outgoing.writer_is_awake();
    }
}

#[cfg(target_os = "linux")]
fn unnamed_file(bytes: usize) -> io::Result<File> {
    use rustix::fs::{MemfdFlags, SealFlags};
    let memory = rustix::fs::memfd_create("finetune", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&memory, bytes as u64)?;
    // A file that became shorter would end both processes at their next access.
    rustix::fs::fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(File::from(memory))
}

#[cfg(target_os = "linux")]
fn is_sealed(file: &File) -> bool {
    rustix::fs::fcntl_get_seals(file).is_ok_and(|seals| seals.contains(rustix::fs::SealFlags::SHRINK))
}

#[cfg(target_os = "linux")]
fn descriptor(file: &File) -> i32 {
    std::os::fd::AsRawFd::as_raw_fd(file)
}

#[cfg(not(target_os = "linux"))]
fn unnamed_file(_bytes: usize) -> io::Result<File> {
    Err(io::Error::from(io::ErrorKind::Unsupported))
}

#[cfg(not(target_os = "linux"))]
fn is_sealed(_file: &File) -> bool {
    false
}

#[cfg(not(target_os = "linux"))]
fn descriptor(_file: &File) -> i32 {
    -1
}

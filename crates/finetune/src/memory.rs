//! The allocator's settings, and how much memory and processor time this process has used.

/// Keeps freed pages instead of giving them back to the system between the tensors of a step: fresh pages
/// have to be zeroed, which was measured to cost a step 1.2 to 2 times its time.
#[expect(unsafe_code, reason = "mimalloc's options are a C function")]
pub(crate) fn keep_freed_memory() {
    /// `mi_option_purge_delay` of mimalloc.h, for which the Rust crate has no name.
    const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
    // SAFETY: the call stores an integer in a table; 15 is inside the table of every mimalloc 2 and 3.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, -1) };
}

/// Largest resident memory so far, in bytes. Linux's getrusage also counts what a process was before it became this program:
/// under a launcher in Python, that one's memory.
pub(crate) fn peak_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    if let Some(kilobytes) = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()) {
        return kilobytes * 1024;
    }
    let unit = if cfg!(target_os = "macos") { 1 } else { 1024 };
    u64::try_from(usage().ru_maxrss).unwrap_or(0) * unit
}

/// Processor time of this process so far, its own and the system's for it, in seconds.
pub(crate) fn processor_seconds() -> f64 {
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage().ru_utime) + seconds(usage().ru_stime)
}

#[expect(unsafe_code, reason = "getrusage is a C function")]
fn usage() -> libc::rusage {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the call fills the struct it is given; zeroes are a valid value of it should the call fail.
    unsafe {
        libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr());
        usage.assume_init()
    }
}

/// Bytes of main memory that this process may use, where it can be told: the machine's, swap included, or what its
/// container is allowed.
#[cfg(not(target_os = "macos"))]
pub(crate) fn machine_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kilobytes = |name: &str| -> Option<u64> {
        let line = text.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse().ok()
    };
    let machine = (kilobytes("MemTotal:")? + kilobytes("SwapTotal:").unwrap_or(0)) * 1024;
    let allowed = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        .iter()
        .filter_map(|path| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok());
    allowed.chain([machine]).min()
}

/// Bytes of memory that a run may take: all but what macOS and its window server need, which take it back by swapping
/// everything else out.
#[cfg(target_os = "macos")]
#[expect(unsafe_code, reason = "sysctl is a C function")]
pub(crate) fn machine_bytes() -> Option<u64> {
    let mut bytes = 0u64;
    let mut size = std::mem::size_of::<u64>();
    // SAFETY: the name ends with a zero; the call writes at most `size` bytes into `bytes`.
    let status = unsafe {
        libc::sysctlbyname(c"hw.memsize".as_ptr(), (&raw mut bytes).cast(), &mut size, std::ptr::null_mut(), 0)
    };
    (status == 0 && bytes > 0).then(|| bytes - (bytes / 8).max(2 << 30).min(bytes / 2))
}

/// The error of a process that cannot have more memory, put together before it is needed: then there is no memory to do it.
static LAST_WORDS: std::sync::OnceLock<String> = std::sync::OnceLock::new();

/// What to say where memory runs out.
pub(crate) fn prepare_last_words(hints: &[String]) {
    let hints: String = hints.iter().map(|hint| format!("hint: {hint}\n")).collect();
    let _ = LAST_WORDS.set(format!("error: the system gives this process no more memory; checkpoints are safe\n\n{hints}"));
}

/// mimalloc, which ends the process in an orderly way where the system has no memory left: with what to do about it, and the
/// exit code of it.
pub(crate) struct Allocator;

#[expect(unsafe_code, reason = "a global allocator hands out memory")]
// SAFETY: every call goes to mimalloc as it is; a call that would return null does not return.
unsafe impl std::alloc::GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: std::alloc::Layout) -> *mut u8 {
        // SAFETY: the caller's promises are those of the callee.
        given(unsafe { mimalloc::MiMalloc.alloc(layout) })
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: std::alloc::Layout) {
        // SAFETY: as above.
        unsafe { mimalloc::MiMalloc.dealloc(pointer, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: std::alloc::Layout) -> *mut u8 {
        // SAFETY: as above.
        given(unsafe { mimalloc::MiMalloc.alloc_zeroed(layout) })
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: std::alloc::Layout, size: usize) -> *mut u8 {
        // SAFETY: as above.
        given(unsafe { mimalloc::MiMalloc.realloc(pointer, layout, size) })
    }
}

fn given(pointer: *mut u8) -> *mut u8 {
    if pointer.is_null() {
        out_of_memory();
    }
    pointer
}

#[cold]
#[expect(unsafe_code, reason = "writes and exits without allocating")]
fn out_of_memory() -> ! {
    let words = LAST_WORDS.get().map_or("error: the system gives this process no more memory\n", String::as_str);
    // SAFETY: the pointer and length are those of a string; `_exit` does not return.
    unsafe {
        libc::write(2, words.as_ptr().cast(), words.len());
        libc::_exit(5);
    }
}

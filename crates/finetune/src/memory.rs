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

/// Memory of this machine in bytes, swap included, where it can be told.
pub(crate) fn machine_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kilobytes = |name: &str| -> Option<u64> {
        let line = text.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse().ok()
    };
    Some((kilobytes("MemTotal:")? + kilobytes("SwapTotal:").unwrap_or(0)) * 1024)
}

//! How much memory there is, and how much memory and processor time this process has used.

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

//! How much memory there is, how much of it this process may have, and how much memory and processor time it has used.

use finetune_store::human_bytes;
use rustix::process::{Resource, getrlimit};

/// Largest resident memory so far, in bytes. Linux's getrusage is not used: it also counts the
/// program that started this one, such as a launcher in Python.
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
    // SAFETY: the call fills the struct that it is given. If it fails, the struct is zero, which is
    // a valid value.
    unsafe {
        libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr());
        usage.assume_init()
    }
}

/// A hint for a process that lacks memory or threads, if a limit of its shell may be why. Reserved addresses and the
/// stacks of threads count under these limits, used or not.
pub(crate) fn limit_hint() -> Option<String> {
    let limits = [('v', "addresses", Resource::As), ('d', "data", Resource::Data)];
    let limits = limits.into_iter().filter_map(|(option, what, kind)| Some((getrlimit(kind).current?, option, what)));
    limits.min().map(|(bytes, option, what)| limit_words(bytes, option, what))
}

fn limit_words(bytes: u64, option: char, what: &str) -> String {
    let bytes = human_bytes(bytes);
    format!(
        "this process may have {bytes} of {what} (`ulimit -{option}`), and takes more of them than of memory: raise the \
         limit, or take it away with `ulimit -{option} unlimited`"
    )
}

/// Bytes of main memory that this process may use: those of the machine with swap, or the lowest
/// limit of its control groups. `None` if the system does not tell.
#[cfg(not(target_os = "macos"))]
pub(crate) fn machine_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kilobytes = |name: &str| -> Option<u64> {
        let line = text.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse().ok()
    };
    let machine = (kilobytes("MemTotal:")? + kilobytes("SwapTotal:").unwrap_or(0)) * 1024;
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let allowed = limits(&groups, &mounts);
    let allowed = allowed.iter().filter_map(|path| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok());
    allowed.chain([machine]).min()
}

/// The files that may hold a limit of this process, by /proc/self/cgroup and /proc/self/mountinfo.
/// Slurm and systemd make a group for each job; the groups above it count too. See cgroups(7).
#[cfg(not(target_os = "macos"))]
fn limits(groups: &str, mounts: &str) -> Vec<std::path::PathBuf> {
    use std::path::{Component, Path, PathBuf};

    let mut files = Vec::new();
    for line in groups.lines() {
        // "0::/user.slice/job" in version 2, "7:memory:/slurm/job" in version 1.
        let mut parts = line.splitn(3, ':');
        let (Some(number), Some(controllers), Some(group)) = (parts.next(), parts.next(), parts.next()) else {
            continue;
        };
        let version_2 = number == "0" && controllers.is_empty();
        if !version_2 && !controllers.split(',').any(|name| name == "memory") {
            continue;
        }
        let name = if version_2 { "memory.max" } else { "memory.limit_in_bytes" };
        for mount in mounts.lines() {
            // ID, parent, device, root of the mount in its file system, mount point, … - type,
            // source, options.
            let Some((place, kind)) = mount.split_once(" - ") else { continue };
            let place: Vec<&str> = place.split(' ').collect();
            let kind: Vec<&str> = kind.split(' ').collect();
            let (Some(root), Some(point)) = (place.get(3), place.get(4)) else { continue };
            let is_it = match (kind.first(), version_2) {
                (Some(&"cgroup2"), true) => true,
                (Some(&"cgroup"), false) => {
                    kind.get(2).is_some_and(|options| options.split(',').any(|name| name == "memory"))
                }
                _ => false,
            };
            if !is_it {
                continue;
            }
            // A container sees the group from its own root, or the mount from the group's root.
            let inside = Path::new(group).strip_prefix(root).unwrap_or(Path::new(group));
            let inside: PathBuf = inside.components().filter(|it| matches!(it, Component::Normal(_))).collect();
            files.extend(inside.ancestors().map(|group| Path::new(point).join(group).join(name)));
        }
    }
    files
}

/// Bytes of memory that a run may take. macOS and its window server need the rest. If they lack it,
/// they swap everything else out.
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

#[cfg(all(test, not(target_os = "macos")))]
mod tests {
    use super::limits;

    /// (/proc/self/cgroup, /proc/self/mountinfo, the files that hold limits)
    #[test]
    fn every_group_above_the_process_has_its_say() {
        let v2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate";
        let v1 = "31 23 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                  32 23 0:28 / /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory";
        let container = "40 23 0:28 /docker/ab /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory";
        let cases = [
            (
                "0::/system.slice/job.scope\n",
                v2,
                vec![
                    "/sys/fs/cgroup/system.slice/job.scope/memory.max",
                    "/sys/fs/cgroup/system.slice/memory.max",
                    "/sys/fs/cgroup/memory.max",
                ],
            ),
            ("0::/\n", v2, vec!["/sys/fs/cgroup/memory.max"]),
            ("0::/../other\n", v2, vec!["/sys/fs/cgroup/other/memory.max", "/sys/fs/cgroup/memory.max"]),
            (
                "8:cpu,cpuacct:/a\n7:memory:/slurm/job_1\n0::/x\n",
                v1,
                vec![
                    "/sys/fs/cgroup/memory/slurm/job_1/memory.limit_in_bytes",
                    "/sys/fs/cgroup/memory/slurm/memory.limit_in_bytes",
                    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
                ],
            ),
            (
                "7:memory:/docker/ab/step\n",
                container,
                vec!["/sys/fs/cgroup/memory/step/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.limit_in_bytes"],
            ),
            ("nonsense\n", "nonsense", vec![]),
        ];
        for (groups, mounts, expected) in cases {
            let found: Vec<String> = limits(groups, mounts).iter().map(|path| path.display().to_string()).collect();
            assert_eq!(found, expected, "{groups}");
        }
    }
}

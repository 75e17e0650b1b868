"""A control group that limits and measures the memory of a program (version 1 or 2, Linux, root), and files that are to
come from the disk. For big-model and benches/disk.py.
"""
import os
import pathlib

ROOT = pathlib.Path("/sys/fs/cgroup")
# Names of version 1 and 2: limit, limit with swap, peak, and (file, word) of memory that is no cache and of processes
# that were killed for want of it.
VERSION_1 = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.max_usage_in_bytes",
             ("memory.stat", "total_rss"), ("memory.oom_control", "oom_kill"))
VERSION_2 = ("memory.max", "memory.swap.max", "memory.peak", ("memory.stat", "anon"), ("memory.events", "oom_kill"))


class MemoryGroup:
    """A new, empty group of this name. `limit` is in bytes, page cache included, and swap is not taken instead.

    Pages of a file count for the group that first reads them: `forget` files that are to count here.
    """

    def __init__(self, name, limit=None):
        first = (ROOT / "memory/memory.limit_in_bytes").exists()
        names = VERSION_1 if first else VERSION_2
        limited, limited_swap, self.peak_name, self.anonymous_name, self.kills_name = names
        self.path = ROOT / "memory" / name if first else ROOT / name
        if not first:
            (ROOT / "cgroup.subtree_control").write_text("+memory")
        self.close()
        self.path.mkdir()
        if limit:
            (self.path / limited).write_text(str(limit))
            # Not there if the kernel does not count swap. Version 1 counts memory and swap together, version 2 swap.
            if (self.path / limited_swap).exists():
                (self.path / limited_swap).write_text(str(limit) if first else "0")

    def join(self):
        """Brings the calling process into the group, for `preexec_fn`."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def peak(self):
        """The most bytes so far, page cache included; `None` before Linux 5.19 in version 2."""
        path = self.path / self.peak_name
        return int(path.read_text()) if path.exists() else None

    def anonymous(self):
        """Bytes now that are no page cache: what has to stay in memory."""
        return self._number(self.anonymous_name)

    def kills(self):
        return self._number(self.kills_name)

    def _number(self, name):
        file, word = name
        lines = (self.path / file).read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.split()[0] == word), 0)

    def close(self):
        """Removes the group. No process is in it any more."""
        if self.path.exists():
            self.path.rmdir()


def forget(path):
    """Drops a file from the page cache, so that it is next read from the disk."""
    with open(path, "rb") as file:
        # Pages that are not yet written would stay.
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

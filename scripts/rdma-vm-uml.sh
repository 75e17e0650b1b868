#!/usr/bin/env bash
# rdma-vm-uml.sh - build, once, the User-Mode Linux kernel that rdma-vm.sh boots in about two
# seconds.
#
#   rdma-vm-uml.sh
#
# User-Mode Linux is a Linux kernel built as an ordinary program: no KVM, no root, no kernel modules
# on the host. It needs ptrace, and it runs on x86-64 only. rdma-vm.sh works without it, on an
# emulated PC that boots and computes several times slower. This build (6 minutes of processor time)
# pays if those tests run often.
#
# The source is Debian's linux-source package (140 MB to fetch, 1.7 GB of disk while it builds; an
# interrupted build goes on where it stopped). The result is one file of 6 MB:
# $FINETUNE_RDMA_VM/linux-uml. It is a GPL-2.0 test tool that each user builds for themselves; no
# part of it is linked into or shipped with finetune.
#
#   FINETUNE_RDMA_VM    the cache (default: ${XDG_CACHE_HOME:-~/.cache}/finetune-rdma-vm)
#   JOBS                compilers at once (default: one per core); prefix the call with `nice` on a
#                       shared machine
set -euo pipefail

cache=${FINETUNE_RDMA_VM:-${XDG_CACHE_HOME:-$HOME/.cache}/finetune-rdma-vm}
jobs=${JOBS:-$(nproc)}

die() {
    echo "rdma-vm-uml: $*" >&2
    exit 126
}

[ "$(uname -sm)" = "Linux x86_64" ] || die "User-Mode Linux builds on x86-64 Linux only, this is $(uname -sm)"
cache=$(realpath -m "$cache")

missing=()
for tool_package in gcc:gcc make:make flex:flex bison:bison bc:bc xz:xz-utils apt-get:apt dpkg-deb:dpkg; do
    command -v "${tool_package%%:*}" >/dev/null || missing+=("${tool_package##*:}")
done
[ -e /usr/include/stdio.h ] || missing+=(libc6-dev)
[ ${#missing[@]} -eq 0 ] || die "missing tools; install them with:
    sudo apt-get install --no-install-recommends ${missing[*]}"

if [ -x "$cache/linux-uml" ]; then
    echo "rdma-vm-uml: $cache/linux-uml is there already; remove it to build it again" >&2
    exit 0
fi

# The folder has a fixed name, so that a second call continues the first one's work; the lock keeps
# two calls apart.
work=$cache/uml-build
mkdir -p "$work"
exec 9>"$cache/uml-build.lock"
flock -n 9 || die "another build is running in $work"
cd "$work"

# ---- source --------------------------------------------------------------------------------------

if [ ! -e source/.unpacked ]; then
    # `linux-source` depends on the release's current source package. rxe's behaviour was checked on
    # 6.1 (Debian 12).
    package=$(apt-cache depends linux-source 2>/dev/null | awk '/Depends: linux-source-/ { print $2; exit }')
    [ -n "$package" ] || die "apt knows no linux-source package; try: sudo apt-get update"
    echo "rdma-vm-uml: fetching and unpacking $package" >&2
    rm -rf source ./linux-source-*.deb
    # As root, apt would fetch as a user who may not write here.
    apt-get download -qq -o APT::Sandbox::User=root "$package"
    mkdir source
    dpkg-deb --fsys-tarfile ./linux-source-*.deb |
        tar -xO --wildcards './usr/src/linux-source-*.tar.xz' |
        tar -xJ -C source --strip-components=1
    rm ./linux-source-*.deb

    # User-Mode Linux fixes the scheduler's tick at 100 Hz and has a single processor: a process
    # that polls for a completion holds it until a tick, 10 ms, before rxe gets its turn to deliver
    # one. At 1000 Hz it waits 1 ms.
    sed -i '/^config HZ$/,/^$/ s/default 100$/default 1000/' source/arch/um/Kconfig
    touch source/.unpacked
fi

# ---- configuration: everything off (allnoconfig) but this ----------------------------------------

options=(
    # A 64-bit kernel in one piece. EXPERT unlocks the options that allnoconfig would otherwise
    # leave at their defaults.
    64BIT EXPERT PRINTK BUG MULTIUSER CC_OPTIMIZE_FOR_PERFORMANCE HIGH_RES_TIMERS NO_HZ_IDLE SLUB

    # What a program expects of the system: the system calls of glibc, tokio and Rust's standard
    # library.
    FUTEX EPOLL EVENTFD TIMERFD SIGNALFD INOTIFY_USER POSIX_TIMERS MEMBARRIER AIO IO_URING ADVISE_SYSCALLS
    FILE_LOCKING SYSVIPC SHMEM BINFMT_ELF BINFMT_SCRIPT

    # File systems. HOSTFS is the host's tree as the root of the guest.
    HOSTFS PROC_FS PROC_SYSCTL SYSFS TMPFS DEVTMPFS DEVTMPFS_MOUNT

    # Terminals: the only channels out are inherited file descriptors (stdout, stderr, the kernel
    # log).
    TTY UNIX98_PTYS STDERR_CONSOLE NULL_CHAN

    # Network: loopback, dummy and veth, routes by policy, and packet loss on request.
    NET UNIX PACKET INET IPV6 NETDEVICES NET_CORE DUMMY VETH NAMESPACES NET_NS
    IP_ADVANCED_ROUTER IP_MULTIPLE_TABLES NET_SCHED NET_SCH_NETEM NET_SCH_TBF

    # INFINIBAND asks for memory-mapped I/O and DMA, which User-Mode Linux has only through its
    # emulated PCI bus.
    VIRTIO_MENU VIRTIO_UML PCI UML_PCI_OVER_VIRTIO

    # The purpose of it all. rxe computes its checksums through the kernel's crc32.
    CRYPTO CRYPTO_CRC32 INFINIBAND INFINIBAND_USER_ACCESS INFINIBAND_ADDR_TRANS RDMA_RXE
)
{
    printf 'CONFIG_%s=y\n' "${options[@]}"
    # The emulated bus wants the number of a device, though none will ever be plugged in.
    echo 'CONFIG_UML_PCI_OVER_VIRTIO_DEVICE_ID=1234'
} >options.config

make -s -C source ARCH=um KCONFIG_ALLCONFIG="$work/options.config" allnoconfig

# Kconfig drops what it does not know or cannot satisfy, silently; say so now and not at the end of
# the build.
for option in HOSTFS TMPFS DEVTMPFS VETH DUMMY IP_MULTIPLE_TABLES NET_SCH_NETEM INFINIBAND_USER_ACCESS RDMA_RXE; do
    grep -q "^CONFIG_$option=y" source/.config || die "this kernel source does not accept CONFIG_$option"
done

# ---- build ---------------------------------------------------------------------------------------

echo "rdma-vm-uml: compiling with $jobs job(s), about 1200 files" >&2
make -s -C source ARCH=um -j"$jobs" linux
strip -o linux-uml source/linux
mv linux-uml "$cache/linux-uml" # one rename: a reader sees the whole kernel or none
cd "$cache"
rm -rf "$work"
echo "rdma-vm-uml: built $cache/linux-uml" >&2

#!/usr/bin/env bash
# rdma-vm.sh - run a command on a throw-away Linux kernel that has verbs devices (soft-RoCE, the
# rdma_rxe driver).
#
#   rdma-vm.sh [options] -- COMMAND [ARGUMENTS...]
#   rdma-vm.sh [-a BACKEND] --check      exit 0 if it could run here; else 126 and the reason.
#                                        Builds nothing.
#   rdma-vm.sh [-a BACKEND] --setup      fill the cache, run nothing
#
# For tests of the RDMA transport on a machine without RDMA hardware, without root and without
# touching the host's kernel. It proves correctness only: soft-RoCE is slower than TCP, so no time
# measured here says anything about RDMA.
#
# The guest sees the host's files read-only, so that COMMAND and its libraries need no copying;
# /tmp, /var/tmp, /run and /dev/shm are empty and writable; shared folders are writable at the same
# path as outside. COMMAND is root, has TCP on 127.0.0.1, and no network card: nothing leaves the
# guest. stdin is empty.
#
#   -d LAYOUT    loop (default): devices rxe0, rxe1, ... each on its own dummy interface d0, d1, ...
#                with address 10.77.N.1. Processes on the same device reach each other, any number
#                of them, and no packet crosses an interface; two devices do not reach each other.
#                veth: rxe0 (10.77.0.1, on v0) and rxe1 (10.77.0.2, on v1), the two ends of one
#                wire. Packets cross it, so that `tc qdisc add dev v0 root netem loss 1%`, run
#                inside, loses some of them.
#   -n DEVICES   devices of layout loop (default 1)
#   -c CPUS      processors of a qemu guest (default 2); uml has one
#   -m MIB       memory of the guest (default 1024)
#   -t SECONDS   time for everything, boot included (default 300)
#   -s FOLDER    share a folder (repeatable; default: the current folder)
#   -e KEY=VALUE environment of COMMAND (repeatable); nothing else of the caller's environment goes
#                in
#   -a BACKEND   qemu: an emulated PC (no KVM) with Debian's stock kernel, 70 MB to fetch once; 4 to
#                10 s of boot
#                uml: the User-Mode Linux kernel that rdma-vm-uml.sh builds; 1 to 2 s of boot
#                auto (default): uml if it is built, else qemu
#
# stdout, stderr and the exit code are those of COMMAND. Besides: 124 time is up; 125 the guest
# failed (its kernel log goes to stderr); 126 wrong usage or something missing on this machine.
#
#   FINETUNE_RDMA_VM              the cache (default: ${XDG_CACHE_HOME:-~/.cache}/finetune-rdma-vm)
#   FINETUNE_RDMA_VM_KERNEL_DEB   a linux-image-*-amd64 package of Debian, where apt does not offer
#                                 one (Ubuntu)
set -euo pipefail

cache=${FINETUNE_RDMA_VM:-${XDG_CACHE_HOME:-$HOME/.cache}/finetune-rdma-vm}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PATH=$PATH:/usr/sbin:/sbin # ip, modprobe and depmod, which Debian hides from ordinary users

layout=loop devices=1 cpus=2 memory_mib=1024 seconds=300 backend=auto action=run
shares=() environment=()

die() {
    echo "rdma-vm: $*" >&2
    exit 126
}

usage() {
    sed -n '2,/^set -/ { /^set -/d; s/^# \{0,1\}//; p; }' "${BASH_SOURCE[0]}"
}

while [ $# -gt 0 ]; do
    case $1 in
    --) shift; break ;;
    -h | --help) usage; exit 0 ;;
    --check | --setup) action=${1#--}; shift; continue ;;
    -[dncmtsea]) [ $# -ge 2 ] || die "option $1 needs a value" ;;
    *) die "unknown option $1 (COMMAND comes after --; see --help)" ;;
    esac
    case $1 in
    -d) layout=$2 ;;
    -n) devices=$2 ;;
    -c) cpus=$2 ;;
    -m) memory_mib=$2 ;;
    -t) seconds=$2 ;;
    -s) shares+=("$2") ;;
    -e) environment+=("$2") ;;
    -a) backend=$2 ;;
    esac
    shift 2
done

case $layout in loop | veth) ;; *) die "-d is loop or veth, not $layout" ;; esac
case $backend in auto | qemu | uml) ;; *) die "-a is auto, qemu or uml, not $backend" ;; esac
for number in "$devices" "$cpus" "$memory_mib" "$seconds"; do
    [[ $number =~ ^[1-9][0-9]{0,5}$ ]] || die "-n, -c, -m and -t take a whole number from 1 on, not $number"
done
[ "$devices" -le 64 ] || die "-n is at most 64"
for setting in ${environment[@]+"${environment[@]}"}; do
    [[ $setting =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || die "-e takes KEY=VALUE, not $setting"
done
[ "$action" != run ] || [ $# -gt 0 ] || die "no COMMAND (see --help)"

# ---- what this machine offers --------------------------------------------------------------------

# Both guests run the host's own x86-64 programs.
[ "$(uname -sm)" = "Linux x86_64" ] || die "this runs on x86-64 Linux only, this is $(uname -sm)"
cache=$(realpath -m "$cache")

if [ "$backend" = auto ]; then
    if [ -x "$cache/linux-uml" ]; then backend=uml; else backend=qemu; fi
fi

missing=() packages=()
need() { # need PROGRAM-OR-FILE PACKAGE
    command -v "$1" >/dev/null || [ -e "$1" ] || { missing+=("$1"); packages+=("$2"); }
}
need busybox busybox-static
need ip iproute2
need rdma iproute2
# Through this file libibverbs finds the driver of rxe.
need /etc/libibverbs.d/rxe.driver "libibverbs1 ibverbs-providers"
if [ "$backend" = qemu ]; then
    need qemu-system-x86_64 qemu-system-x86
    need cpio cpio
    if [ ! -e "$cache/qemu/complete" ]; then
        need depmod kmod
        need xz xz-utils
        need dpkg-deb dpkg
    fi
fi
[ ${#missing[@]} -eq 0 ] || die "missing: ${missing[*]}; install them with
    sudo apt-get install --no-install-recommends $(printf '%s\n' "${packages[@]}" | sort -u | paste -sd ' ')"

# A busybox that loads shared libraries cannot start before the guest has any.
! ldd "$(command -v busybox)" >/dev/null 2>&1 || die "busybox is not static; install it with
    sudo apt-get install busybox-static"

# The package that linux-image-amd64 depends on today; nothing if apt knows none.
kernel_package() {
    apt-cache depends linux-image-amd64 2>/dev/null | awk '/Depends: linux-image-/ { print $2; exit }' || true
}
case $backend in
uml)
    [ -x "$cache/linux-uml" ] || die "no User-Mode Linux kernel in $cache; build it with rdma-vm-uml.sh"
    ;;
qemu)
    [ -e "$cache/qemu/complete" ] || [ -n "${FINETUNE_RDMA_VM_KERNEL_DEB:-}" ] || [ -n "$(kernel_package)" ] ||
        die "apt offers no linux-image-amd64 to boot: run apt-get update (Debian), or set FINETUNE_RDMA_VM_KERNEL_DEB"
    ;;
esac
[ "$action" != check ] || exit 0

# ---- the cache of the QEMU back end: a kernel and the modules to load, in their order ------------

# The stock kernel, since Debian's -cloud kernel lacks rdma_rxe. crc32 is for rxe's checksums: the
# guest has no modprobe that could load it on demand.
modules=(virtio_pci virtio_console 9pnet_virtio 9p crc32_generic crc32_pclmul dummy veth sch_netem ib_uverbs rdma_rxe)

# vmlinuz unpacks itself at boot, which takes an emulated processor seven seconds; this does it
# once. The header of vmlinuz says where the payload is (Linux: Documentation/x86/boot.rst). Its
# last four bytes are its unpacked length.
unpack_kernel() { # unpack_kernel VMLINUZ VMLINUX
    local setup_sectors offset length start
    setup_sectors=$(od -An -tu1 -j $((0x1f1)) -N 1 "$1")
    offset=$(od -An -tu4 -j $((0x248)) -N 4 "$1")
    length=$(od -An -tu4 -j $((0x24c)) -N 4 "$1")
    start=$(((setup_sectors + 1) * 512 + offset))
    head -c $((start + length - 4)) "$1" | tail -c +$((start + 1)) | xz -dc >"$2" 2>/dev/null ||
        cp "$1" "$2" # packed in another way: it boots as it is, only later
}

fill_qemu_cache() {
    local work=$cache/qemu.new package=${FINETUNE_RDMA_VM_KERNEL_DEB:-} version module number=100
    rm -rf "$work" "$cache/qemu"
    mkdir -p "$work/unpacked" "$work/modules"
    if [ -z "$package" ]; then
        echo "rdma-vm: fetching the kernel (once, 70 MB)" >&2
        # As root, apt would fetch as its own user, who may not write here.
        (cd "$work" && apt-get download -qq -o APT::Sandbox::User=root "$(kernel_package)") >&2
        package=$(echo "$work"/linux-image-*.deb)
    fi
    dpkg-deb -x "$package" "$work/unpacked"
    # Debian keeps modules below usr/lib since version 13.
    [ -d "$work/unpacked/lib" ] || ln -s usr/lib "$work/unpacked/lib"
    version=$(ls "$work/unpacked/lib/modules")
    unpack_kernel "$work/unpacked/boot/vmlinuz-$version" "$work/vmlinux"

    # Every module after those it needs, each once; the number keeps the order.
    # It warns of lists that only an installed kernel has.
    depmod -b "$work/unpacked" "$version" 2>/dev/null
    for module in "${modules[@]}"; do
        modprobe -d "$work/unpacked" -S "$version" --show-depends "$module"
    done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' | while read -r module; do
        case $module in
        *.xz) xz -dc "$module" ;;
        *) cat "$module" ;;
        esac >"$work/modules/$number.ko"
        number=$((number + 1))
    done
    rm -rf "$work/unpacked" "$work"/*.deb
    echo "$version" >"$work/complete"
    mv "$work" "$cache/qemu" # one rename: a reader sees the whole cache or none
}

if [ "$backend" = qemu ] && [ ! -e "$cache/qemu/complete" ]; then
    mkdir -p "$cache"
    # Of several first calls at once, one fills the cache and the others wait for it. No `|| die`
    # behind the parentheses: it would switch `set -e` off inside them.
    set +e
    (
        set -e
        flock 9
        [ -e "$cache/qemu/complete" ] || fill_qemu_cache
    ) 9>"$cache/qemu.lock"
    status=$?
    set -e
    [ $status = 0 ] || die "could not prepare the kernel in $cache; the reason is above"
fi
[ "$action" != setup ] || exit 0

# ---- what this run hands to the guest ------------------------------------------------------------

[ ${#shares[@]} -gt 0 ] || shares=("$PWD")
for i in "${!shares[@]}"; do
    [ -d "${shares[i]}" ] || die "no folder ${shares[i]} to share"
    shares[i]=$(realpath "${shares[i]}")
    [ "${shares[i]}" != / ] || die "the root folder cannot be shared; choose one with -s"
done

visible_inside() { # the guest has its own, empty, folders of these names
    local share
    case $1/ in /tmp/* | /var/tmp/* | /run/* | /dev/*) ;; *) return 0 ;; esac
    for share in "${shares[@]}"; do
        case $1/ in "$share"/*) return 0 ;; esac
    done
    return 1
}
working_folder=$(pwd -P)
visible_inside "$working_folder" || die "the guest does not see the current folder, $PWD; share it with -s"
program=$(realpath -m "$(command -v "$1" || echo "$1")")
visible_inside "$program" || die "the guest does not see $program; share its folder with -s"

run=$(mktemp -d "${TMPDIR:-/tmp}/finetune-rdma-vm.XXXXXX")
control=$run/control
mkdir "$control"
virtual_machine='' readers=()
# shellcheck disable=SC2317,SC2329 # called by the trap
clean_up() {
    if [ -n "$virtual_machine" ]; then kill -TERM "$virtual_machine" 2>/dev/null || true; fi
    rm -rf "$run"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

quoted() { # each argument in single quotes, for sh
    local argument
    for argument; do printf "'%s' " "${argument//\'/\'\\\'\'}"; done
}

cp "$here/rdma-vm-guest.sh" "$control/guest.sh"
cat >"$control/settings" <<END
backend=$backend layout=$layout devices=$devices
working_folder=$(quoted "$working_folder")
ip=$(command -v ip) rdma=$(command -v rdma)
END
cat >"$control/command.sh" <<END
exec /usr/bin/env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp LANG=C.UTF-8 \
    FINETUNE_RDMA_VM_GUEST=$backend $(quoted ${environment[@]+"${environment[@]}"}) $(quoted "$@")
END
printf '%s\n' "${shares[@]}" >"$control/shares"

# The guest writes COMMAND's output into these two pipes. File descriptors 3 and 4 keep them open
# from here on, so that nobody waits for a peer at opening; once the guest is gone and both are
# closed, the readers come to the end.
mkfifo "$run/stdout" "$run/stderr"
exec 3<>"$run/stdout" 4<>"$run/stderr"
cat "$run/stdout" 3>&- 4>&- &
readers+=($!)
cat "$run/stderr" >&2 3>&- 4>&- &
readers+=($!)

# ---- the back ends: each starts the guest, and ends when the guest does; kernel log: $run/log ----

# The guest must not outlive this script, even when a test harness ends the script with SIGKILL.
limit=(setpriv --pdeathsig TERM timeout -k 5 "$seconds")

qemu_init() { # the first process in QEMU's guest: from the initial file system to the host's tree
    cat <<'END'
#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
for module in /modules/*.ko; do insmod $module; done
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=524288,cache=loose host /host
for folder in proc sys dev; do mount --move /$folder /host/$folder; done
mount -t tmpfs none /host/run
mkdir -p /host/run/finetune-rdma-vm /host/run/bin
mount -t 9p -o trans=virtio,version=9p2000.L,cache=none control /host/run/finetune-rdma-vm
cp -P /bin/* /host/run/bin/
PATH=/run/bin exec chroot /host /run/bin/busybox sh /run/finetune-rdma-vm/guest.sh
END
}

run_qemu() {
    local files=$run/initramfs i options=()
    mkdir -p "$files"/{bin,proc,sys,dev,host}
    cp "$(command -v busybox)" "$files/bin/busybox"
    cp -r "$cache/qemu/modules" "$files/modules"
    qemu_init >"$files/init"
    chmod +x "$files/init"
    (cd "$files" && find . | cpio -o -H newc -R 0:0 --quiet) >"$run/initramfs.cpio"

    # A comma in a value is doubled.
    for i in "${!shares[@]}"; do
        options+=(-virtfs "local,path=${shares[i]//,/,,},mount_tag=share$i,security_model=none,multidevs=remap")
    done
    # panic=-1 with -no-reboot: a guest that fails ends, and does not sit there until time is up.
    exec "${limit[@]}" qemu-system-x86_64 \
        -machine q35 -accel tcg,thread=multi -cpu max -smp "$cpus" -m "$memory_mib" \
        -nodefaults -no-user-config -display none -no-reboot \
        -kernel "$cache/qemu/vmlinux" -initrd "$run/initramfs.cpio" \
        -append "console=ttyS0 quiet panic=-1 oops=panic mitigations=off nokaslr audit=0 no_timer_check tsc=reliable \
random.trust_cpu=on rcupdate.rcu_expedited=1" \
        -chardev "file,id=log,path=$run/log,append=on" -serial chardev:log \
        -device virtio-serial-pci \
        -chardev "file,id=stdout,path=$run/stdout" -device virtserialport,chardev=stdout,name=stdout \
        -chardev "file,id=stderr,path=$run/stderr" -device virtserialport,chardev=stderr,name=stderr \
        -virtfs "local,path=/,mount_tag=host,security_model=none,multidevs=remap,readonly=on" \
        -virtfs "local,path=${control//,/,,},mount_tag=control,security_model=none" \
        "${options[@]}" </dev/null >>"$run/log" 2>&1 3>&- 4>&-
}

uml_init() { # the first process of User-Mode Linux, which starts on the host's tree
    cat <<END
#!$(command -v busybox) sh
busybox=$(command -v busybox)
\$busybox mount -t proc none /proc
\$busybox mount -t sysfs none /sys
\$busybox mount -t tmpfs none /run
\$busybox mkdir -p /run/finetune-rdma-vm /run/bin
\$busybox mount -t hostfs none /run/finetune-rdma-vm -o '$control'
\$busybox --install -s /run/bin
PATH=/run/bin exec sh /run/finetune-rdma-vm/guest.sh
END
}

run_uml() {
    uml_init >"$control/init"
    chmod +x "$control/init"
    # The guest's memory is a file that must be executable; /dev/shm is best unless too small (64 MB
    # in containers).
    local memory_folder=/dev/shm
    [ "$(df --output=avail -m /dev/shm | tail -1)" -ge "$memory_mib" ] || memory_folder=$run
    # Three consoles without input: the kernel log, and the command's stdout and stderr.
    exec 8>>"$run/log"
    TMPDIR=$memory_folder exec "${limit[@]}" "$cache/linux-uml" \
        mem="${memory_mib}M" root=/dev/root rootfstype=hostfs rootflags=/ ro init="$control/init" \
        uml_dir="$run/" quiet panic=-1 oops=panic \
        ssl=null con=null con0=null,fd:8 con1=null,fd:3 con2=null,fd:4 </dev/null >&8 2>&8
}

case $backend in
qemu) run_qemu & ;;
uml) run_uml & ;;
esac
virtual_machine=$!
status=0
# The shell would report a guest that ends by a signal among the command's own stderr. One halt of
# User-Mode Linux in some two hundred does, after the command has ended and its exit code is
# written.
wait "$virtual_machine" 2>/dev/null || status=$?
virtual_machine=''
exec 3>&- 4>&-
# A reader fails if the output is closed, as in `rdma-vm.sh ... | head -1`.
wait "${readers[@]}" || true

if [ -s "$control/exit_code" ]; then exit "$(cat "$control/exit_code")"; fi
if [ $status = 124 ] || [ $status = 137 ]; then
    echo "rdma-vm: time is up after $seconds s; the end of the guest's kernel log:" >&2
    tail -n 20 "$run/log" >&2
    exit 124
fi
echo "rdma-vm: the guest failed (back end $backend, exit code $status); its kernel log:" >&2
tail -n 60 "$run/log" >&2
exit 125

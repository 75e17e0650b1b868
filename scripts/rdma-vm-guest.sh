#!/bin/sh
# rdma-vm-guest.sh - the first process of the guest that rdma-vm.sh boots. Not meant to be called by
# hand.
#
# It runs as root under busybox, in the guest only, once the back end's own first lines (see
# qemu_init and uml_init in rdma-vm.sh) have mounted the host's tree read-only at /, and the folder
# that carries this file at $control. Everything printed here goes to the kernel log, which the user
# sees when the guest fails.

control=/run/finetune-rdma-vm
backend='' layout='' devices='' working_folder='' ip='' rdma=''
# shellcheck source=/dev/null # rdma-vm.sh writes it, with these variables
. "$control/settings"

# The control folder holds no exit code then, and that is how the host knows that the guest failed.
fail() {
    echo "rdma-vm-guest: $*"
    poweroff -f
}

# ---- the file system: writable where programs expect it, and nowhere else ------------------------

mkdir -p /dev/shm /dev/pts
for folder in /tmp /var/tmp /dev/shm; do mount -t tmpfs none $folder; done
mount -t devpts none /dev/pts
ln -sf /proc/self/fd /dev/fd

share=0
while read -r folder; do
    mkdir -p "$folder" # below /tmp the folder exists on the host only
    case $backend in
    qemu) mount -t 9p -o trans=virtio,version=9p2000.L,msize=524288,cache=mmap "share$share" "$folder" ;;
    uml) mount -t hostfs none "$folder" -o "$folder" ;;
    esac || fail "cannot mount the shared folder $folder"
    share=$((share + 1))
done <"$control/shares"

# ---- the network and the verbs devices -----------------------------------------------------------

# 4200 leaves room for RoCE's headers around the largest path MTU, 4096 bytes.
mtu=4200

# Every device on its own dummy interface. rxe hands a packet for the device's own address straight
# back, so any number of processes on one device reach each other, and no packet crosses an
# interface.
loop_links() {
    i=0
    while [ $i -lt "$devices" ]; do
        echo "link add d$i mtu $mtu type dummy"
        echo "link set d$i up"
        echo "addr add 10.77.$i.1/24 dev d$i"
        i=$((i + 1))
    done
}

# Two devices on the two ends of one wire. Both ends are in one network namespace, because rxe knows
# only the first one. Both addresses are then the kernel's own, and it must not send packets between
# 10.77.0.1 and 10.77.0.2 through the loopback:
#  - the table of local addresses normally comes first, and moves behind the two rules below;
#  - what is sent through one end (as rxe does) takes a table with only the route to the other end;
#  - neighbours are static, as no host answers an ARP request that seems to come from itself.
veth_links() {
    echo "link add v0 mtu $mtu address 02:00:00:00:00:01 type veth peer name v1 mtu $mtu address 02:00:00:00:00:02"
    echo "addr add 10.77.0.1/32 dev v0"
    echo "addr add 10.77.0.2/32 dev v1"
    echo "link set v0 up"
    echo "link set v1 up"
    echo "rule add pref 100 lookup local"
    echo "rule del pref 0"
    echo "rule add pref 10 oif v0 lookup 10"
    echo "rule add pref 11 oif v1 lookup 11"
    echo "route add 10.77.0.2 dev v0 src 10.77.0.1 table 10"
    echo "route add 10.77.0.1 dev v1 src 10.77.0.2 table 11"
    echo "neigh replace 10.77.0.2 lladdr 02:00:00:00:00:02 dev v0 nud permanent"
    echo "neigh replace 10.77.0.1 lladdr 02:00:00:00:00:01 dev v1 nud permanent"
}

case $layout in
loop) interface=d ;;
veth)
    interface=v devices=2
    # A packet that arrives from one of the kernel's own addresses is otherwise dropped as forged.
    echo 1 >/proc/sys/net/ipv4/conf/all/accept_local
    ;;
esac

# $ip is the host's iproute2, since busybox's `ip` knows no veth pairs and too little of routing
# rules. One process does it all: starting a program is slow on an emulated processor.
{
    echo "link set lo up"
    "${layout}_links"
} | "$ip" -batch - || fail "cannot set up the network of layout $layout"

# A packet over veth is received by the processor that sent it, and rxe sends one message from
# several processors: with two of them packets overtake each other, and UC throws the message away.
# A real wire keeps the order, so the first processor receives all of them. (User-Mode Linux has one
# processor, and no such file.)
for queue in /sys/class/net/v[01]/queues/rx-0/rps_cpus; do
    [ ! -e "$queue" ] || echo 1 >"$queue"
done

i=0
while [ $i -lt "$devices" ]; do
    echo "link add rxe$i type rxe netdev $interface$i"
    i=$((i + 1))
done | "$rdma" -b - || fail "cannot add the rxe devices"

# The kernel fills a new device's table of addresses (GIDs) a moment later, and a program that asks
# for the one of its IPv4 address before that finds none.
i=0
while [ $i -lt "$devices" ]; do
    tries=0
    until grep -q '^0000:0000:0000:0000:0000:ffff:' /sys/class/infiniband/rxe$i/ports/1/gids/[01] 2>/dev/null; do
        tries=$((tries + 1))
        [ $tries -lt 200 ] || fail "rxe$i got no GID for its IPv4 address within 10 s"
        sleep 0.05
    done
    i=$((i + 1))
done

# ---- the command ---------------------------------------------------------------------------------

case $backend in
qemu)
    for port in /sys/class/virtio-ports/*; do
        case $(cat "$port/name") in
        stdout) stdout=/dev/${port##*/} ;;
        stderr) stderr=/dev/${port##*/} ;;
        esac
    done
    ;;
uml)
    stdout=/dev/tty1 stderr=/dev/tty2
    # Bytes as they are: "\n" does not become "\r\n".
    for terminal in "$stdout" "$stderr"; do stty -F "$terminal" raw -echo; done
    ;;
esac

cd "$working_folder" || fail "no folder $working_folder in the guest"
sh "$control/command.sh" </dev/null >"$stdout" 2>"$stderr"
echo $? >"$control/exit_code"
sync
poweroff -f

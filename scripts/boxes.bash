# boxes.bash - several "hosts" on this machine, for slurm-here.sh and sshd-here.sh, which source it.
#
# A box is a network, UTS and mount namespace of its own: its host name is box-N, its only way to
# the others is one end of a veth pair (eth0, address $boxes_net.N), and its /etc/hosts knows them
# all by name. The other ends (ft<N>x…) hang on a bridge whose address $boxes_net.254 is this
# machine. Files and processes are shared with this machine. Needs root.
#
# A box lives as long as its holder, a sleeping process; with it go its namespaces and its cable.

boxes_missing() { # prints what is missing to make boxes; nothing if nothing is
    local tool
    [ "$(id -u)" = 0 ] || { echo "root, for network namespaces"; return; }
    for tool in ip unshare nsenter mount; do
        command -v "$tool" >/dev/null || { echo "$tool (Debian: iproute2, util-linux)"; return; }
    done
    local probe=ftp$$
    if ! unshare --net --uts --mount true 2>/dev/null; then
        echo "leave to make namespaces"
    elif ! ip link add "$probe" type bridge 2>/dev/null; then
        echo "leave to make network interfaces, or a kernel with bridges"
    else
        ip link del "$probe"
    fi
}

boxes_up() { # FOLDER COUNT
    local folder=$1 count=$2 box bridge net tag
    # Network and names of interfaces come from this process's number, so that two rigs can run side
    # by side.
    tag=$(printf '%x' $$)
    bridge=ftb$tag
    for net in 10.213.$(($$ % 250 + 1)) 10.213.$(($$ / 250 % 250 + 1)) 198.18.$(($$ % 250 + 1)); do
        [ -n "$(ip -4 route show "$net.0/24" 2>/dev/null)" ] || break
    done
    echo "$bridge" >"$folder/bridge"
    echo "$net" >"$folder/net"
    ip link add "$bridge" type bridge
    ip addr add "$net.254/24" dev "$bridge"
    ip link set "$bridge" up
    {
        echo "127.0.0.1 localhost"
        echo "$net.254 hub"
        for ((box = 1; box <= count; box++)); do echo "$net.$box box-$box"; done
    } >"$folder/hosts"
    for ((box = 1; box <= count; box++)); do
        # No file of the caller may stay open in the holder. Otherwise a reader that waits for its
        # end waits for ever.
        unshare --net --uts --mount setsid sleep infinity </dev/null >/dev/null 2>&1 &
        echo $! >"$folder/box-$box.pid"
        disown $!
        boxes_settled "$folder" "$box"
        ip link add "ft${box}x$tag" type veth peer name eth0 netns "$(<"$folder/box-$box.pid")"
        ip link set "ft${box}x$tag" master "$bridge" up
        box_run "$folder" "$box" sh -ec "
            hostname box-$box
            mount --bind '$folder/hosts' /etc/hosts
            ip link set lo up
            ip addr add $net.$box/24 dev eth0
            ip link set eth0 up"
    done
}

boxes_settled() { # FOLDER BOX: waits until the holder is in its own namespaces
    local holder own try
    holder=$(<"$1/box-$2.pid")
    own=$(readlink /proc/self/ns/mnt)
    for ((try = 0; try < 500; try++)); do
        [ "$(readlink "/proc/$holder/ns/mnt")" = "$own" ] || [ "$(<"/proc/$holder/comm")" != sleep ] || return 0
        sleep 0.01
    done
    echo "box $2 does not start" >&2
    return 1
}

box_run() { # FOLDER BOX COMMAND...: replaces no process; the working directory stays
    local folder=$1 box=$2
    shift 2
    nsenter --target "$(<"$folder/box-$box.pid")" --net --uts --mount --wd="$PWD" -- "$@"
}

box_cable() { # FOLDER BOX: the name of the box's cable at the bridge
    local bridge
    bridge=$(<"$1/bridge")
    echo "ft$2x${bridge#ftb}"
}

boxes_down() { # FOLDER; also of one that is half made
    local folder=$1 file pid
    for file in "$folder"/box-*.pid; do
        [ -e "$file" ] || continue
        pid=$(<"$file")
        # By now the number could belong to another process.
        case $(tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null) in
        "sleep infinity "*) kill "$pid" 2>/dev/null || true ;;
        esac
        rm -f "$file"
    done
    if [ -e "$folder/bridge" ]; then
        local bridge cable
        bridge=$(<"$folder/bridge")
        # The kernel takes an empty namespace away a while later; its cable need not wait for that.
        for cable in /sys/class/net/ft*x"${bridge#ftb}"; do
            [ ! -e "$cable" ] || ip link del "${cable##*/}" 2>/dev/null || true
        done
        ip link del "$bridge" 2>/dev/null || true
        rm -f "$folder/bridge"
    fi
}

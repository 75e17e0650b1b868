#!/usr/bin/env bash
# sshd-here.sh - several "hosts" on this machine that are reached over a real ssh: box-1, box-2, ...
#
#   sshd-here.sh [options] -- COMMAND [ARGUMENTS...]   start, run COMMAND, stop
#   sshd-here.sh [options] --start                     start, print the folder and how to use it,
#                                                      and leave it running
#   sshd-here.sh --stop FOLDER                         stop what --start started
#   sshd-here.sh --cut FOLDER BOX | --heal FOLDER BOX  (with --netns) a silent partition of one box,
#                                                      and its end
#   sshd-here.sh [--netns] --check                     exit 0 if it could run here; else 126 and the
#                                                      reason
#
# Each host is an OpenSSH server with its own host key and port. The keys, the configuration and the
# logs lie in a temporary folder; nobody's ~/.ssh, no file in /etc and no service is touched, and at
# the end no process and no file is left. Logins are those of the user who starts this, on 127.0.0.1
# (with --netns: on the boxes' network) only, with the key in the folder only. Up in half a second.
# Works as root and as an ordinary user (who cannot have --netns).
#
#   -n HOSTS     hosts (default 2)
#   -t SECONDS   time for COMMAND (default 300)
#   --netns      each host in a network namespace, with host name and address of its own: loopback
#                reaches nobody else, and packets between hosts cross a cable that tc can delay and
#                --cut can cut
#
# In the folder (SSHD_HERE in COMMAND's environment):
#
#   ssh_config      ssh -F FOLDER/ssh_config box-1 hostname
#   bin/ssh, scp    the same without -F, for programs that call ssh; COMMAND has them first in its
#                   PATH
#   hosts.json      a hostfile of all boxes:
#                   finetune launch --hostfile FOLDER/hosts.json -- recipe.toml
#   cables          (with --netns) one line per box: name, address and the interface of this machine
#                   at its other end:
#                   tc qdisc add dev INTERFACE root netem delay 2ms (what comes to that box; needs a
#                   kernel with netem)
#
# stdout, stderr and the exit code are those of COMMAND. Besides: 124 time is up; 125 a server did
# not start; 126 wrong usage or something missing on this machine.
#
# Debian: apt-get install --no-install-recommends openssh-server openssh-client
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PATH=$PATH:/usr/sbin:/sbin # sshd and ip, which Debian hides from ordinary users

hosts=2 seconds=300 netns=no action=run

die() {
    echo "sshd-here: $*" >&2
    exit 126
}

is_ours() { # a folder that --start made
    [[ $1 =~ ^/tmp/sshd-here\.[A-Za-z0-9]+$ ]] && [ -f "$1/hosts.json" ] || die "$1 is no folder of --start"
}

while [ $# -gt 0 ]; do
    case $1 in
    --) shift; break ;;
    -h | --help) sed -n '2,/^set -/ { /^set -/d; s/^# \{0,1\}//; p; }' "${BASH_SOURCE[0]}"; exit 0 ;;
    --check | --start) action=${1#--}; shift; continue ;;
    --netns) netns=yes; shift; continue ;;
    --stop) [ $# = 2 ] || die "--stop takes the folder"; action=stop folder=$2; shift 2; continue ;;
    --cut | --heal)
        [ $# = 3 ] || die "$1 takes the folder and the box"
        action=${1#--} folder=$2 box=${3#box-}
        shift 3
        continue
        ;;
    -[nt]) [ $# -ge 2 ] || die "option $1 needs a value" ;;
    *) die "unknown option $1 (COMMAND comes after --; see --help)" ;;
    esac
    [[ $2 =~ ^[1-9][0-9]{0,5}$ ]] || die "$1 takes a whole number from 1 on, not $2"
    case $1 in
    -n) hosts=$2 ;;
    -t) seconds=$2 ;;
    esac
    shift 2
done
[ "$hosts" -le 64 ] || die "-n is at most 64"

# shellcheck source=scripts/boxes.bash
. "$here/boxes.bash"

stop() {
    local pid file session
    for file in "$folder"/sshd-*.pid; do
        [ -e "$file" ] || continue
        pid=$(<"$file")
        # The number could be somebody else's by now.
        grep -qsaF "$folder/sshd_config-" "/proc/$pid/cmdline" || continue
        # A session outlives its server, and waits long where its cable is cut.
        for session in $(cat /proc/[0-9]*/stat 2>/dev/null | awk -v server="$pid" '$4 == server { print $1 }') "$pid"; do
            kill -KILL "$session" 2>/dev/null || true
        done
    done
    # What was started in sessions, by a variable that every session has.
    for pid in $(grep -lsazFx "SSHD_HERE=$folder" /proc/[0-9]*/environ 2>/dev/null | grep -o '[0-9]*'); do
        case $pid in "$$" | "$BASHPID") ;; *) kill -KILL "$pid" 2>/dev/null || true ;; esac
    done
    boxes_down "$folder"
    rm -rf "$folder"
}

case $action in
stop) is_ours "$folder"; stop; exit 0 ;;
cut | heal)
    is_ours "$folder"
    [ -e "$folder/box-$box.pid" ] || die "there is no cable to box-$box (--netns)"
    # The cable stays plugged in on the box's side, so that nothing there notices but by silence.
    if [ "$action" = cut ]; then
        ip link set "$(box_cable "$folder" "$box")" nomaster
    else
        ip link set "$(box_cable "$folder" "$box")" master "$(<"$folder/bridge")"
    fi
    exit 0
    ;;
esac

for tool in sshd ssh ssh-keygen; do
    command -v "$tool" >/dev/null ||
        die "no $tool here (Debian: apt-get install --no-install-recommends openssh-server openssh-client)"
done
if [ "$netns" = yes ]; then
    missing=$(boxes_missing)
    [ -z "$missing" ] || die "--netns needs $missing"
fi
[ "$action" != check ] || exit 0
[ "$action" = start ] || [ $# -gt 0 ] || die "no COMMAND (it comes after --; see --help)"

folder=$(mktemp -d /tmp/sshd-here.XXXXXX)
command_pid=

finish() {
    local code=$?
    trap '' INT TERM HUP
    if [ -n "$command_pid" ] && kill -0 "$command_pid" 2>/dev/null; then
        kill -TERM -- "-$command_pid" 2>/dev/null || true
    fi
    stop
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

fail() {
    echo "sshd-here: $*" >&2
    tail -n 20 "$folder"/log-* >&2
    exit 125
}

mkdir "$folder/bin"
[ "$netns" = no ] || boxes_up "$folder" "$hosts"

ssh-keygen -q -t ed25519 -N '' -C sshd-here -f "$folder/key"
cp "$folder/key.pub" "$folder/authorized_keys"
# As root the server wants this empty folder of the system to be there; Debian makes it when the
# service starts.
[ "$(id -u)" != 0 ] || [ -d /run/sshd ] || mkdir -m 755 /run/sshd

# Ports below those that Linux gives to outgoing connections, ten for each process; taken ones are passed over.
port=$((20000 + $$ % 1000 * 10))
free_port() {
    while port=$((port + 1)); do
        (: </dev/tcp/127.0.0.1/$port) 2>/dev/null || break
    done
}

entries=()
for ((box = 1; box <= hosts; box++)); do
    if [ "$netns" = yes ]; then
        address=$(<"$folder/net").$box
        port=22
        echo "box-$box $address $(box_cable "$folder" "$box")" >>"$folder/cables"
    else
        address=127.0.0.1
        free_port
    fi
    ssh-keygen -q -t ed25519 -N '' -C "box-$box" -f "$folder/host_key-$box"
    echo "box-$box $(<"$folder/host_key-$box.pub")" >>"$folder/known_hosts"
    cat >"$folder/sshd_config-$box" <<END
Port $port
ListenAddress $address
HostKey $folder/host_key-$box
PidFile $folder/sshd-$box.pid
AuthorizedKeysFile $folder/authorized_keys
AllowUsers $(id -un)
PermitRootLogin prohibit-password
AuthenticationMethods publickey
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
UseDNS no
PrintMotd no
PrintLastLog no
MaxStartups 200
SetEnv SSHD_HERE=$folder
Subsystem sftp internal-sftp
END
    cat >>"$folder/ssh_config" <<END
Host box-$box
    HostName $address
    Port $port
    HostKeyAlias box-$box
END
    entries+=("{\"ssh\": \"box-$box\", \"ips\": [\"$address\"]}")
done
cat >>"$folder/ssh_config" <<END
Host *
    User $(id -un)
    IdentityFile $folder/key
    IdentitiesOnly yes
    UserKnownHostsFile $folder/known_hosts
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
    BatchMode yes
    LogLevel ERROR
END
(IFS=,; printf '[%s]\n' "${entries[*]}") >"$folder/hosts.json"
for tool in ssh scp sftp; do
    printf '#!/bin/sh\nexec %s -F %s/ssh_config "$@"\n' "$(command -v "$tool")" "$folder" >"$folder/bin/$tool"
    chmod 755 "$folder/bin/$tool"
done

export SSHD_HERE=$folder
for ((box = 1; box <= hosts; box++)); do
    # In a session of its own: Ctrl-C is for COMMAND. sshd wants to be called by its whole path.
    server=(setsid "$(command -v sshd)" -D -e -f "$folder/sshd_config-$box")
    [ "$netns" = no ] || server=(nsenter --target "$(<"$folder/box-$box.pid")" --net --uts --mount -- "${server[@]}")
    "${server[@]}" </dev/null >/dev/null 2>>"$folder/log-$box" &
    disown $!
done
for ((box = 1; box <= hosts; box++)); do
    for ((try = 0; try < 6000; try++)); do
        ! grep -qs "^Server listening" "$folder/log-$box" || break
        sleep 0.01
    done
    [ "$try" -lt 6000 ] || fail "the server of box-$box does not start"
done

if [ "$action" = start ]; then
    trap - EXIT INT TERM HUP
    echo "$folder"
    cat <<END

ssh -F $folder/ssh_config box-1 hostname
PATH=$folder/bin:\$PATH finetune cluster bench --hostfile $folder/hosts.json
$0 --stop $folder
END
    [ "$netns" = no ] || { echo; cat "$folder/cables"; }
    exit 0
fi

# In a process group of its own, so that it can be stopped with all that it started.
set -m
PATH=$folder/bin:$PATH timeout --kill-after=10 "$seconds" "$@" &
command_pid=$!
set +m
code=0
wait "$command_pid" || code=$?
command_pid=
exit "$code"

# What `finetune cluster discover`, `setup` and `doctor` ask a host. It changes nothing. POSIX sh, macOS and Linux.
# `mark`, `program`, `folder` and `root` are set in front of it. Everything is in a function, so that a script that was cut off
# on its way does nothing; every command reads from /dev/null, and never what login files have left on the standard input.
say() {
    section=$1
    shift
    printf '\n%s begin %s\n' "$mark" "$section"
    "$@" </dev/null 2>&1
    printf '\n%s end %s %s\n' "$mark" "$section" "$?"
}

version() { "$program" --version; }
binary() { cksum "$(command -v "$program")"; }
identity_of_macos() { sysctl -n kern.bootsessionuuid; }
identity_of_linux() { cat /proc/sys/kernel/random/boot_id && readlink /proc/self/ns/net; }
login() { printf '%s\n' "$SSH_CONNECTION"; }

both() {
    say clock date +%s.%N
    say system uname -srm
    say name uname -n
    say login login
    say version version
    say binary binary
    say disk df -Pk "$folder"
    say files ulimit -n
}

thunderbolt() { system_profiler SPThunderboltDataType -json 2>/dev/null; }
hardware() { sysctl hw.model hw.memsize machdep.cpu.brand_string; }
listening_on_macos() { netstat -an -p tcp | grep LISTEN; }
firewall_on_macos() {
    /usr/libexec/ApplicationFirewall/socketfilterfw --getglobalstate
    /usr/libexec/ApplicationFirewall/socketfilterfw --getblockall
}

macos() {
    say identity identity_of_macos
    say release sw_vers
    say hardware hardware
    say ports networksetup -listallhardwareports
    say interfaces ifconfig -a
    say rdma rdma_ctl status
    say devices ibv_devices
    say device_details ibv_devinfo -v
    say power pmset -g
    say firewall firewall_on_macos
    say listening listening_on_macos
    say routes netstat -rn -f inet
    [ "$root" = ask ] && say root sudo -n true
    say thunderbolt thunderbolt
}

release() { grep -E '^PRETTY_NAME=' /etc/os-release; }
memory() { grep -E '^MemTotal:' /proc/meminfo; }
links() {
    for folder in /sys/class/net/*; do
        [ -e "$folder" ] || continue
        wireless=no
        [ -e "$folder/wireless" ] && wireless=yes
        printf '%s state=%s speed=%s wireless=%s\n' "${folder##*/}" "$(cat "$folder/operstate" 2>/dev/null)" \
            "$(cat "$folder/speed" 2>/dev/null)" "$wireless"
    done
}
infiniband() {
    for folder in /sys/class/infiniband/*; do
        [ -e "$folder" ] || continue
        printf 'device %s\n' "${folder##*/}"
        for interface in "$folder"/device/net/*; do
            [ -e "$interface" ] && printf 'interface %s\n' "${interface##*/}"
        done
        [ -e "$folder/parent" ] && printf 'interface %s\n' "$(cat "$folder/parent")"
        printf 'state %s\n' "$(cat "$folder/ports/1/state")"
        printf 'layer %s\n' "$(cat "$folder/ports/1/link_layer")"
        printf 'rate %s\n' "$(cat "$folder/ports/1/rate")"
        for index in 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do
            gid=$(cat "$folder/ports/1/gids/$index" 2>/dev/null) && [ -n "$gid" ] && printf 'gid %s %s\n' "$index" "$gid"
            interface=$(cat "$folder/ports/1/gid_attrs/ndevs/$index" 2>/dev/null) && printf 'interface %s\n' "$interface"
        done
    done
}
library() {
    { ldconfig -p || /sbin/ldconfig -p; } 2>/dev/null | grep 'libibverbs\.so\.1' && return
    ls -d /usr/lib*/libibverbs.so.1 /usr/lib/*/libibverbs.so.1 2>/dev/null
}
character_devices() {
    for device in /dev/infiniband/uverbs*; do
        [ -e "$device" ] || continue
        [ -r "$device" ] && [ -w "$device" ] && { printf 'usable %s\n' "$device"; continue; }
        printf 'refused %s\n' "$device"
    done
}
firewall_on_linux() {
    for service in firewalld ufw nftables iptables; do
        printf '%s %s\n' "$service" "$(systemctl is-active "$service" 2>/dev/null)"
    done
}
listening_on_linux() { ss -ltnH 2>/dev/null || netstat -ltn; }

linux() {
    say identity identity_of_linux
    say release release
    say memory memory
    say links links
    say interfaces ip -o -4 addr show
    say infiniband infiniband
    say library library
    say character_devices character_devices
    say locked ulimit -l
    say firewall firewall_on_linux
    say listening listening_on_linux
}

facts() {
    LC_ALL=C
    PATH="$PATH:/usr/bin:/bin:/usr/sbin:/sbin:/usr/local/bin:/usr/local/sbin"
    export LC_ALL PATH
    both
    case "$(uname -s)" in
        Darwin) macos ;;
        Linux) linux ;;
    esac
    printf '\n%s done\n' "$mark"
}
facts

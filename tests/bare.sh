#!/usr/bin/env bash
# `make bare`: the tests on a machine that has nothing but what README.md asks for. A Debian 12 of the smallest kind
# (debootstrap's minbase) is made in a temporary directory, the last commit is cloned into it, and `make test` runs there.
#
#     make bare ARGS='tests/hf/test_static_cache.py'     # a part of the tests
#     make bare EXTRA='g++ python3-dev'                  # with packages that are optional
#     make bare TARGET=quickstart                        # another target than test
#
# It needs root, debootstrap, the package indexes of apt and pip as this machine has them set up, and 8 GB in TMPDIR.
# Mounts and processes are in namespaces of their own: nothing of them is seen outside, and when a trap has killed the
# first process all are gone. Then it removes the directory.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)

# The pip settings of this machine, one PIP_NAME=value a line, so that pip finds the same packages inside.
pip_settings() {
    local python
    for python in "$here/.venv/bin/python" python3 python; do
        if "$python" -m pip --version >/dev/null 2>&1; then
            "$python" -m pip config list | "$python" -c '
import ast, sys
found = {}
for line in sys.stdin:
    name, value = line.rstrip("\n").split("=", 1)
    section, key = name.rsplit(".", 1)
    found[section, key.upper().replace("-", "_")] = " ".join(ast.literal_eval(value).split())
settings = {k: v for wanted in ("global", "install", ":env:") for (section, k), v in found.items() if section == wanted}
print(*(f"PIP_{key}={value}" for key, value in settings.items()), sep="\n")'
            return
        fi
    done
}

# The second half, in namespaces of its own: ROOT PACKAGES [MIRROR] makes the system, mounts what a machine has, and runs
# the target.
if [ "${1:-}" = inside ]; then
    root=$2
    echo "making a Debian 12 with ${3//,/, } (2 minutes)"
    if ! debootstrap --variant=minbase --include="$3" bookworm "$root" ${4:+"$4"} >"$root.log" 2>&1; then
        tail -5 "$root.log" >&2
        echo "error: make bare: debootstrap failed" >&2
        exit 1
    fi
    git clone -q --depth 1 "file://$here" "$root/root/megameta"
    echo "make ${TARGET:-test} in it, commit $(git -C "$root/root/megameta" rev-parse --short HEAD)"
    if [ -n "$(git -C "$here" status --porcelain)" ]; then
        echo "what is not committed is left out"
    fi
    mount --rbind /dev "$root/dev"
    mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
    mount --rbind /sys "$root/sys"
    mount -t proc proc "$root/proc"
    cp -L /etc/resolv.conf /etc/hosts "$root/etc/"
    settings=(PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8)
    for name in http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY CI; do
        if [ -n "${!name:-}" ]; then settings+=("$name=${!name}"); fi
    done
    while IFS= read -r setting; do
        settings+=("$setting")
        for word in ${setting#*=}; do
            path=${word#file://}
            [[ $path == /* && -e $path ]] || continue
            # An index of links lies beside the files that it links to: the directory above has both.
            if [[ $word == file://* ]]; then path=$(dirname "$path"); fi
            if mountpoint -q "$root$path" || [ "$path" = / ]; then continue; fi
            if [ -d "$path" ]; then
                mkdir -p "$root$path"
            else
                mkdir -p "$root$(dirname "$path")"
                touch "$root$path"
            fi
            mount --bind -o ro "$path" "$root$path"
        done
    done < <(pip_settings)
    # Not exec: this shell is the first process here, and takes what orphaned processes leave.
    status=0
    chroot "$root" env -i "${settings[@]}" make -C /root/megameta "${TARGET:-test}" "ARGS=${ARGS:-}" || status=$?
    exit "$status"
fi

fail() {
    echo "error: make bare: $*" >&2
    exit 1
}
[ "$(id -u)" = 0 ] || fail "it needs root, to make a system and mount things in it"
command -v debootstrap >/dev/null || fail "debootstrap is missing: apt install debootstrap"
namespaces=(unshare --mount --propagation private --pid --fork --kill-child --mount-proc)
"${namespaces[@]}" true || fail "this machine makes no namespaces (unshare fails)"

# What README.md asks for, in its own words: "apt install …" in its first lines.
needed=$(sed -n 's/^ *apt install \([^#]*[^# ]\).*/\1/p' "$here/README.md" | head -1)
[ -n "$needed" ] || fail "README.md has no line that begins with 'apt install'"
packages=$(echo "$needed ${EXTRA:-}" | tr -s ' ' ',')

# apt's own mirror on a Debian, else debootstrap's.
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Codename: bookworm' 'Origin: Debian' \
    2>/dev/null | head -1 || true)

system=$(mktemp -d "${TMPDIR:-/tmp}/megameta-bare.XXXXXX")
child=
clean_up() {
    if [ -n "$child" ]; then
        kill -KILL "$child" 2>/dev/null || true
        wait "$child" 2>/dev/null || true
    fi
    rm -rf --one-file-system "$system" "$system.log"
}
trap clean_up EXIT
trap 'exit 130' INT TERM HUP
chmod 755 "$system"

"${namespaces[@]}" "$here/tests/bare.sh" inside "$system" "${packages%,}" ${mirror:+"$mirror"} &
child=$!
status=0
wait "$child" || status=$?
child=
exit "$status"

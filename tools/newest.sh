#!/usr/bin/env bash
# The newest Pythons, and the newest versions of the programs that we talk to, beside this machine's:
# a root folder of Debian sid in .newest, and the quick tests in it.
#
#   tools/newest.sh            quick tests on each Python, those with other programs on one
#   tools/newest.sh --again    what failed the last time
#
# Needs root on a Debian machine, whose mirror it takes, and 3 GB. Where it cannot be had, that is said
# in a line, and nothing fails. The folder is kept and made anew after two weeks. Mounts belong to
# processes of a namespace and go with them. The last lines are `N skipped` and `N passed, N failed`.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHONS="3.14 3.15"
PACKAGES="gcc g++ libc6-dev make procps iproute2 fuse3 python3
    nbdkit libnbd-bin qemu-utils criu redis-server valkey-server"
for python in $PYTHONS; do
    PACKAGES="$PACKAGES python$python python$python-venv python$python-dev"
done
#: Files of tests: what depends on the interpreter, on each of them; and on one what talks to others.
CORE="buffer exit fork fork_serve gil_yield interrupt pager pythons raw_gil rescue sync"
PEERS="criu_real nbd_client nbd_promises nbd_serve redis_source"

here=$PWD/.newest
sid=$here/sid

skip() {
    echo "newest: left out: $1"
    printf '1 skipped\n0 passed, 0 failed\n'
    exit 0
}

# quietly SECONDS COMMAND...: its output goes to the log, the end of which tells why it failed.
quietly() {
    timeout -k 10 "$@" >>"$here/log" 2>&1 </dev/null
}
why() { tail -n 1 "$here/log" | cut -c 1-200; }

# The mirror of this machine, in either format of apt's lists.
mirror() {
    {
        sed -n 's/^URIs: *//p' /etc/apt/sources.list.d/*.sources
        sed -n 's/^deb  *\(\[[^]]*\]  *\)\{0,1\}//p' /etc/apt/sources.list /etc/apt/sources.list.d/*.list
    } 2>/dev/null | tr ' ' '\n' | grep -E '^[a-z+]+:.*/debian/?$' | head -n 1
}

# inside COMMAND [ARGUMENT...]: by bash, in the folder as a root of its own (pivot_root, for CRIU looks
# twice at chroot), with no process of it left behind.
inside() {
    local kept=() name
    for name in http_proxy https_proxy all_proxy no_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY \
        PIP_INDEX_URL PIP_CERT UV_DEFAULT_INDEX; do
        [ -z "${!name:-}" ] || kept+=("$name=${!name}")
    done
    # shellcheck disable=SC2016
    unshare --mount --propagation private --pid --fork --kill-child bash -c '
        root=$1; shift
        mount --bind "$root" "$root" && cd "$root" && mkdir -p .before
        mount -t proc proc proc && mount --rbind /sys sys && mount --rbind /dev dev
        mount -t tmpfs tmpfs run
        pivot_root . .before && cd / && umount -l /.before
        env -i HOME=/root LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive UV_SYSTEM_CERTS=1 PYTHONFAULTHANDLER=1 \
            PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@"
        # Not exec: a test must not be the first process of a namespace, which is spared signals.
        exit $?' bash "$sid" "${kept[@]}" bash -euc "$@" </dev/null
}

# What a package manager does for safety costs half of its time, and nothing here has to last.
prepare() {
    mkdir -p "$1/etc/dpkg/dpkg.cfg.d" "$1/etc/apt/apt.conf.d" "$1/usr/sbin" "$1/etc/ssl/certs"
    printf 'force-unsafe-io\npath-exclude /usr/share/doc/*\npath-exclude /usr/share/man/*\n' \
        >"$1/etc/dpkg/dpkg.cfg.d/quick"
    # A mirror may lag behind, and a clock be ahead.
    echo 'Acquire::Check-Valid-Until "false"; APT::Install-Recommends "false";' \
        >"$1/etc/apt/apt.conf.d/quick"
    printf '#!/bin/sh\nexit 101\n' >"$1/usr/sbin/policy-rc.d" # no package may start its server
    chmod +x "$1/usr/sbin/policy-rc.d"
    cp -L /etc/resolv.conf /etc/hosts "$1/etc/"
    [ ! -e /etc/ssl/certs/ca-certificates.crt ] ||
        cp -L /etc/ssl/certs/ca-certificates.crt "$1/etc/ssl/certs/"
}

make_root() {
    local from
    from=$(mirror) || true # not all of these files are there
    [ -n "$from" ] || skip "the lists of apt name no mirror of Debian"
    [ "$(df --output=avail -k "$here" | tail -n 1)" -gt 3000000 ] || skip "it takes 3 GB of disk"
    command -v debootstrap >/dev/null || quietly 180 env DEBIAN_FRONTEND=noninteractive sh -c \
        'apt-get update -qq; apt-get install -y -qq --no-install-recommends debootstrap' ||
        skip "debootstrap cannot be installed: $(why)"
    echo "== newest: a root of Debian sid, from $from"
    rm -rf --one-file-system "$sid"
    # In a namespace as well: it mounts.
    quietly 240 unshare --mount --propagation private --pid --fork --kill-child --mount-proc \
        debootstrap --variant=minbase --include=ca-certificates sid "$sid" "$from" ||
        skip "debootstrap of sid failed: $(why)"
    prepare "$sid"
    # shellcheck disable=SC2086
    quietly 360 bash -c "$(declare -f inside); sid=$sid; inside \"\$@\"" bash \
        'apt-get update -qq; apt-get install -y -qq "$@"; apt-get clean' bash $PACKAGES ||
        skip "packages of sid cannot be installed: $(why)"
    echo "$PACKAGES" >"$here/made"
}

# The sources as they are, with nothing that was built for this machine's Pythons.
copy_sources() {
    rm -rf --one-file-system "$sid/src"
    mkdir "$sid/src"
    tar --exclude='./.venv*' --exclude=./.newest --exclude=./.git --exclude=./build \
        --exclude=./native/tests/build --exclude='*.so' --exclude=__pycache__ -cf - . |
        tar -xf - -C "$sid/src"
}

environment() {
    # uv, which takes seconds, and resolves what pip does not on a Python this new.
    quietly 240 bash -c "$(declare -f inside); sid=$sid; inside \"\$@\"" bash '
        cd /src
        [ -x /uv/bin/uv ] || { python3.14 -m venv /uv && /uv/bin/python -m pip install -q uv; }
        python3.14 tools/requirements.py test >/wanted
        for python; do
            cmp -s /wanted "/venv-$python/.installed" && continue
            rm -rf "/venv-$python"
            "python$python" -m venv "/venv-$python"
            /uv/bin/uv pip install -q --python "/venv-$python/bin/python" --requirement /wanted
            cp /wanted "/venv-$python/.installed"
        done' bash $PYTHONS || skip "packages for the tests cannot be installed: $(why)"
}

passed=0 failed=0
# step NAME COMMAND...: something that is a test by itself.
step() {
    echo "== newest: $1"
    if inside "cd /src; $2" >"$here/step" 2>&1; then
        passed=$((passed + 1))
    else
        cat "$here/step"
        failed=$((failed + 1))
    fi
}

# What the reports and the steps add up to; the last lines.
count() {
    # shellcheck disable=SC2016
    inside 'cd /src; exec python3 -c "$@"' bash '
import sys
from pathlib import Path

sys.path.insert(0, "tools")
from run_tests import counts_of

found = [counts_of(path, path.stem) for path in sorted(Path("/reports").glob("*.xml"))]
for result in found:
    print(f"newest: {result}")
print(f"{sum(result.skipped for result in found)} skipped")
passed = int(sys.argv[1]) + sum(result.passed for result in found)
failed = int(sys.argv[2]) + sum(result.failed for result in found)
print(f"{passed} passed, {failed} failed")
sys.exit(failed != 0)
' "$passed" "$failed"
}

# All of it is read before it begins, so that a new version of this file does no harm to a run.
main() {
    [ "$(id -u)" -eq 0 ] || skip "it takes root"
    [ -e /etc/debian_version ] && command -v apt-get >/dev/null || skip "this is no Debian machine"
    unshare --mount --propagation private --pid --fork true 2>/dev/null || skip "unshare is not allowed"
    mkdir -p "$here"
    exec 9>"$here/lock"
    flock 9
    : >"$here/log"
    start=$SECONDS
    if [ "$(cat "$here/made" 2>/dev/null)" != "$PACKAGES" ] ||
        [ -n "$(find "$here/made" -mtime +14)" ]; then
        rm -f "$here/made"
        make_root
    fi
    again=""
    if [ "${1:-}" = "--again" ]; then
        again="--last-failed --last-failed-no-failures none"
    else
        copy_sources
        environment
        echo "== newest: set up in $((SECONDS - start)) s"
        step "the C client and the C tests, compiled by $(inside 'gcc -dumpfullversion')" \
            'make -s -C native/client check all; make -s -C native/tests build/plain'
        for python in $PYTHONS; do
            step "the native module of $python" \
                "AIOUFFD_DEVELOPER=1 /venv-$python/bin/python setup.py -q build_ext --inplace --force"
        done
    fi
    mkdir -p "$sid/reports"
    rm -f "$sid"/reports/*.xml
    for python in $PYTHONS; do
        files=$CORE
        # The last one has the others' company.
        [ "$python" != "${PYTHONS##* }" ] || files="$files $PEERS"
        files=$(printf 'tests/test_%s.py ' $files)
        echo "== newest: pytest on $python"
        # shellcheck disable=SC2016
        inside 'cd /src; python=$1; shift
            exec timeout -k 10 600 "/venv-$python/bin/python" -m pytest -q -m "not slow" --one-loop \
                -o "cache_dir=/reports/cache-$python" --junitxml="/reports/$python.xml" "$@"' \
            bash "$python" $again $files && status=0 || status=$?
        # 5: none of them had failed.
        [ "$status" -ne 5 ] || rm -f "$sid/reports/$python.xml"
        [ "$status" -le 1 ] || [ "$status" -eq 5 ] || failed=$((failed + 1))
    done
    count
}

main "$@"
exit

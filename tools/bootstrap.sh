#!/usr/bin/env bash
# Makes everything that a checkout needs: system packages, virtual environments, the native module.
#
#   tools/bootstrap.sh [EXTRA...]      extras of pyproject.toml to install (default: test lint)
#
# With ONLY_DEFAULT=1 for the default Python alone; with KERNELS=1 also what boots other kernels. What
# is done already is not done again, so it may run before every command. PYTHON= chooses another
# default Python.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/pythons.sh
[ $# -gt 0 ] || set -- test lint

say() { printf '== %s\n' "$*"; }

compiles_c() {
    echo '#include <stdio.h>
#include <linux/types.h>
int main(void) { return 0; }' | ${CC:-cc} -x c - -o /dev/null 2>/dev/null
}

# The headers and modules that a bare Debian lacks.
system_packages() {
    local packages="" python
    # describe() gives the real interpreter; the distribution's own lives in /usr/bin.
    python=$(describe "${PYTHON:-python3}")
    python=${python#* }
    if ! has_headers "$python"; then
        case "$python" in
        /usr/bin/*) packages="python3-venv python3-dev" ;;
        *)
            echo "$python has no Python.h, venv or ensurepip: install its development files" >&2
            exit 1
            ;;
        esac
    fi
    compiles_c || packages="${packages:+$packages }gcc libc6-dev"
    [ -n "$packages" ] || return 0

    if ! command -v apt-get >/dev/null; then
        echo "missing: $packages (names as in Debian). Install them with this system's" \
            "package manager and run this again" >&2
        exit 1
    fi
    if ! may_install; then
        echo "missing: $packages. As root run:" >&2
        echo "    apt-get update && apt-get install --no-install-recommends $packages" >&2
        exit 1
    fi
    install_packages "$packages"
}

# Servers and tools of others that the tests and benchmarks talk to. Without them those skip.
peers() {
    local packages=""
    command -v nbdkit >/dev/null || packages="nbdkit"
    command -v nbdcopy >/dev/null || packages="$packages libnbd-bin"
    command -v qemu-nbd >/dev/null || packages="$packages qemu-utils"
    command -v redis-server >/dev/null || packages="$packages redis-server"
    command -v fusermount3 >/dev/null || packages="$packages fuse3"
    # The path of a user may lack the last of these folders.
    local program
    for program in nginx lighttpd caddy apache2; do
        PATH="$PATH:/usr/sbin" command -v "$program" >/dev/null ||
            packages="$packages ${program/%apache2/apache2-bin}"
    done
    [ -z "${KERNELS:-}" ] || command -v qemu-system-x86_64 >/dev/null ||
        packages="$packages qemu-system-x86"
    [ -n "$packages" ] || return 0
    if command -v apt-get >/dev/null && may_install; then
        install_packages "$packages" && return 0
        # One that this release does not have must not keep the others away.
        local package lacking=""
        for package in $packages; do
            install_packages "$package" || lacking="$lacking $package"
        done
        packages=$lacking
    fi
    [ -z "$packages" ] || say "without $packages some tests and benchmarks will be skipped"
}

# Web servers of npm, for the same tests, where it is there. That is tried once.
NPM_PACKAGES="http-server@14.1.1 @fastify/send@4.2.1"
npm_peers() {
    local asked=.venv-npm/.asked
    [ "$(cat "$asked" 2>/dev/null)" != "$NPM_PACKAGES" ] || return 0
    command -v npm >/dev/null || return 0
    say ".venv-npm: $NPM_PACKAGES"
    mkdir -p .venv-npm
    # shellcheck disable=SC2086
    timeout 120 npm install --silent --no-audit --no-fund --prefix .venv-npm $NPM_PACKAGES \
        </dev/null >/dev/null 2>&1 || say "they cannot be had; their tests will be skipped"
    printf '%s\n' "$NPM_PACKAGES" >"$asked"
}

as_root=""
may_install() {
    [ "$(id -u)" -ne 0 ] || return 0
    as_root="sudo"
    command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [ -t 0 ]; }
}

install_packages() {
    say "installing $1"
    # No package may start its server here: the tests start their own.
    # shellcheck disable=SC2086
    $as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 sh -c \
        "apt-get update -qq && apt-get install -y -qq --no-install-recommends $1" \
        </dev/null >/dev/null
}

# uv does in seconds what takes pip minutes. Where it cannot be had, which is tried once, or where
# only pip is told of an index, pip does all of it.
uv=""
find_uv() {
    if [ -n "${PIP_INDEX_URL:-}" ] ||
        "$1" -m pip config list 2>/dev/null | grep '[.]index-url=' >/dev/null; then
        return 0
    fi
    if [ ! -d .venv-uv ] && ! command -v uv >/dev/null; then
        say ".venv-uv: uv, which installs packages"
        { "$1" -m venv .venv-uv && .venv-uv/bin/python -m pip install -qq \
            --disable-pip-version-check uv </dev/null; } || true
    fi
    uv=$(command -v .venv-uv/bin/uv || command -v uv || true)
}

# install_packages_of VENV REQUIREMENTS
install_packages_of() {
    [ -z "$uv" ] || UV_SYSTEM_CERTS=1 "$uv" pip install -q \
        --python "$1/bin/python" --requirement "$2" </dev/null ||
        { say "$1: uv cannot, so pip does it" && uv=""; }
    [ -n "$uv" ] || "$1/bin/python" -m pip install -qq --disable-pip-version-check \
        --requirement "$2" </dev/null
}

# lacks VENV EXTRA...: is a package of theirs not installed? Each stamp names what was at a time.
lacks() {
    local venv=$1 wanted
    shift
    [ -x "$venv/bin/python" ] || return 0
    wanted=$("$venv/bin/python" tools/requirements.py "$@")
    printf '%s\n' "$wanted" | grep -qvxF -f <(cat "$venv"/.installed-*- 2>/dev/null)
}

# virtual_environment VERSION PYTHON VENV EXTRA...
virtual_environment() {
    local version=$1 python=$2 venv=$3
    shift 3
    if [ "$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' \
        2>/dev/null)" != "$version" ]; then
        say "$venv: Python $version from $python"
        rm -rf "$venv"
        "$python" -m venv "$venv"
    fi
    if lacks "$venv" "$@"; then
        say "$venv: installing the packages of $*"
        "$venv/bin/python" tools/requirements.py "$@" >"$venv/.installing"
        install_packages_of "$venv" "$venv/.installing"
        mv "$venv/.installing" "$venv/.installed-$(printf '%s-' "$@")"
    fi
}

# For one example, in the default environment alone: it is large. Any version would do. PyPI has no
# build with this name, only such for CUDA of several gigabytes: where pip knows no index with builds
# for CPUs (PIP_EXTRA_INDEX_URL) it gives up at once, is not asked again, and the test is skipped.
TORCH="torch==2.13.0+cpu"
cpu_torch() {
    local asked=.venv/.asked-$TORCH
    [ ! -e "$asked" ] || return 0
    say ".venv: $TORCH, if there is one"
    timeout 300 .venv/bin/python -m pip install -qq --disable-pip-version-check "$TORCH" \
        </dev/null >/dev/null 2>&1 || say "there is none; one test of an example will be skipped"
    : >"$asked"
}

# in_place VENV: let `import aiouffd` and the command find this checkout, as `pip install -e` would,
# which would build the module a second time.
in_place() {
    local venv=$1 packages
    packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    [ "$(cat "$packages/aiouffd.pth" 2>/dev/null)" = "$PWD" ] && return 0
    pwd >"$packages/aiouffd.pth"
    printf '#!%s\nimport sys\nfrom aiouffd_command import main\nsys.exit(main())\n' \
        "$PWD/$venv/bin/python" >"$venv/bin/aiouffd"
    chmod +x "$venv/bin/aiouffd"
}

# native_module VENV: compile aiouffd._native in place unless it is newer than all it is made of.
native_module() {
    local venv=$1 module
    module=aiouffd/_native$("$venv/bin/python" -c \
        'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
    if [ -e "$module" ] && [ -z "$(find native/*.c native/*.h include/*.h native/cdef \
        native/build_ffi.py setup.py -type f -newer "$module" | head -1)" ]; then
        return 0
    fi
    say "$module"
    mkdir -p build
    # With a log, because a compiler that is content has nothing to say.
    if ! AIOUFFD_DEVELOPER=1 "$venv/bin/python" setup.py build_ext --inplace --force \
        >"build/$venv.log" 2>&1 </dev/null; then
        cat "build/$venv.log" >&2
        exit 1
    fi
}

find_pythons >/dev/null # says what is wrong with the default one
system_packages
case " $* " in *" test "* | *" bench "*) peers ;; esac
case " $* " in *" test "*) npm_peers ;; esac
found=$(find_pythons)
# All at a time, for most of it is unpacking and compiling; but the modules one by one, which share
# what is generated for them.
jobs=""
default=${found%%$'\n'*}
default=${default#* }
while read -r version python venv; do
    if lacks "$venv" "$@"; then
        find_uv "${default%% *}"
        break
    fi
done <<<"$found"
while read -r version python venv; do
    virtual_environment "$version" "$python" "$venv" "$@" &
    jobs="$jobs $!"
done <<<"$found"
for job in $jobs; do
    wait "$job"
done
while read -r version python venv; do
    in_place "$venv"
    native_module "$venv"
done <<<"$found"
case " $* " in *" test "*) cpu_torch ;; esac

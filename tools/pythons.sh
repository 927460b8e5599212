# Which Pythons there are, and where their virtual environments belong. Sourced by the other scripts.
#
# .venv is for the default python3 (or $PYTHON); .venv-X.Y is for each other version in SUPPORTED
# that can be found. Only the default one has to exist.

SUPPORTED="3.11 3.12 3.13 3.14 3.15"

# Prints "X.Y path" for a usable CPython with a GIL, or nothing.
describe() {
    "$1" - <<'END' 2>/dev/null || true
import os, sys, sysconfig
if sys.implementation.name == "cpython" and not sysconfig.get_config_var("Py_GIL_DISABLED"):
    # Not the path of a virtual environment that happens to be active.
    base = getattr(sys, "_base_executable", None) or sys.executable
    print("%d.%d" % sys.version_info[:2], os.path.realpath(base))
END
}

# Prints "X.Y path venv" for the default Python, then for each other one.
find_pythons() {
    local default version path other found
    default=$(describe "${PYTHON:-python3}")
    if [ -z "$default" ]; then
        echo "no usable CPython as '${PYTHON:-python3}': install python3 (3.11 or later)" >&2
        return 1
    fi
    version=${default%% *}
    if [ "${version%%.*}" -lt 3 ] || [ "${version##*.}" -lt 11 ]; then
        echo "'${PYTHON:-python3}' is Python $version; 3.11 or later is needed (set PYTHON=)" >&2
        return 1
    fi
    echo "$default .venv"
    [ -z "${ONLY_DEFAULT:-}" ] || return 0
    for other in $SUPPORTED; do
        [ "$other" != "$version" ] || continue
        for path in "$(command -v "python$other" || true)" \
            "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python"$other"; do
            [ -x "$path" ] || continue
            found=$(describe "$path")
            if [ "${found%% *}" = "$other" ] && has_headers "${found#* }"; then
                echo "$found .venv-$other"
                break
            fi
        done
    done
}

has_headers() {
    "$1" -c 'import os, sysconfig, venv, ensurepip
raise SystemExit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' \
        2>/dev/null
}

"""Builds ``aiouffd._native`` from the C files beside this one.

The declarations that Python may call stand in ``native/cdef/*.h``, one file per
C header; cffi's compiler checks them against the real ones. The module is built
outside the limited API because the GIL yield (``handler.c``, ``gil.c``) needs to know which
thread state holds the GIL, which the limited API cannot tell; see docs/concepts.md.
"""

import os
import sysconfig
from pathlib import Path

from cffi import FFI

# FREE-THREADING: gil.c refuses as well; here is who is not used to a compiler's errors.
if sysconfig.get_config_var("Py_GIL_DISABLED"):
    raise SystemExit(
        "aiouffd does not support free-threaded builds of Python yet: use the usual build of this"
        " version (without the t)"
    )

HERE = Path(__file__).resolve().parent
#: The header for clients in C, which the module itself uses.
INCLUDE = HERE.parent / "include"


def _relative(path: Path) -> str:
    return os.path.relpath(path, Path.cwd())


def _sources() -> list[str]:
    return [_relative(path) for path in sorted(HERE.glob("*.c"))]


flags = ["-std=gnu11", "-O2", "-g", "-fvisibility=hidden", "-fno-strict-aliasing"]
link: list[str] = []
if os.environ.get("AIOUFFD_DEVELOPER"):
    flags += ["-Wall", "-Wextra", "-Werror"]
if os.environ.get("AIOUFFD_SANITIZE"):
    sanitizers = f"-fsanitize={os.environ['AIOUFFD_SANITIZE']}"
    flags += [sanitizers, "-fno-omit-frame-pointer"]
    link += [sanitizers]

ffibuilder = FFI()
headers = sorted((HERE / "cdef").glob("*.h"))
for header in headers:
    ffibuilder.cdef(header.read_text())
ffibuilder.set_source(
    "aiouffd._native",
    '#include "native.h"\n',
    sources=_sources(),
    include_dirs=[_relative(HERE), _relative(INCLUDE)],
    extra_compile_args=flags,
    extra_link_args=link,
    libraries=["pthread"],
    define_macros=[("_GNU_SOURCE", None), ("_CFFI_NO_LIMITED_API", None)],
    py_limited_api=False,
    depends=[
        _relative(path)
        for path in [*headers, *sorted(HERE.glob("*.h")), *sorted(INCLUDE.glob("*.h"))]
    ],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)

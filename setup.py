from contextlib import suppress

from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext


class BuildExt(build_ext):
    """Leaves the native module beside its sources too: Python takes ``aiouffd`` from the folder
    that it stands in before it looks at what is installed, and in a source folder that is ours."""

    def run(self) -> None:
        super().run()
        if not self.inplace:
            with suppress(OSError):  # a folder of somebody else
                self.copy_extensions_to_source()


setup(
    cffi_modules=["native/build_ffi.py:ffibuilder"],
    py_modules=["aiouffd_command"],
    cmdclass={"build_ext": BuildExt},
    # The header for C programs stands where a C programmer looks for it, and is installed inside
    # the package, where aiouffd.include_dir() finds it.
    packages=[*find_packages(include=["aiouffd", "aiouffd.*"]), "aiouffd.include"],
    package_dir={"aiouffd.include": "include"},
)

from setuptools import find_packages, setup

setup(
    cffi_modules=["native/build_ffi.py:ffibuilder"],
    # The header for C programs stands where a C programmer looks for it, and is installed inside
    # the package, where aiouffd.include_dir() finds it.
    packages=[*find_packages(include=["aiouffd", "aiouffd.*"]), "aiouffd.include"],
    package_dir={"aiouffd.include": "include"},
)

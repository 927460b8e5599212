"""Benchmarks: programs to run (`python -m benchmarks.NAME`), never collected as tests."""

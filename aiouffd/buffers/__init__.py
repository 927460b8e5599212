"""Lazy buffers, which most people use, and the forms in which they are handed to libraries."""

__all__: list[str] = []

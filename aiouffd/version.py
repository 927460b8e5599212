"""The version of this package, for everybody."""

__all__ = ["VERSION"]

VERSION = "0.1.0"

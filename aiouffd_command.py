"""The command ``aiouffd``, as it is installed.

Outside the package, whose import takes so long that an impatient Ctrl-C often meets it: that ends
the process as SIGINT does by default, and shows nobody a traceback of imports.
"""

import _signal as signal  # signal.py imports more than it takes

__all__ = ["main"]


def main() -> int:
    """Run the command; returns the exit status."""
    # Not where it is ignored, as in the background of a script.
    heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heeded:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from aiouffd.cli import main as command

    if heeded:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return command()
    finally:
        if heeded:  # what is left is the interpreter's own end
            signal.signal(signal.SIGINT, signal.SIG_DFL)

"""Incremental parsing of untrusted JSON.

The standard library parses a text in one call, which holds the GIL until it is done and makes
objects of all of it: a hundred megabytes of brackets are a minute and some gigabytes. Here the
outer object is walked through member by member, and the library gets one value at a time, of a
length with a limit; other threads run in between.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["JsonPieces"]

#: Bytes that are decoded at a time.
_WINDOW = 128 * 1024
_SPACE = re.compile(r"[ \t\n\r]*")


class JsonPieces:
    """A position in a JSON text in UTF-8.

    Not thread-safe.

    Args:
        data: The text, in a buffer that must not change.
        decoder: Makes the values. Exceptions of its hooks propagate.
        error: Makes the exception to raise from a message.
    """

    def __init__(
        self, data: Any, decoder: json.JSONDecoder, error: Callable[[str], Exception]
    ) -> None:
        self._data = memoryview(data).cast("B")
        self._decoder = decoder
        self._error = error
        #: A part of the text, where it begins and ends in bytes, and where we are in it.
        self._text = ""
        self._start = self._stop = 0
        self._at = 0

    def members(self, most: int) -> Iterator[str]:
        """Iterate over the names in the object that begins here.

        The caller has to take the `value` of each before it asks for the next name.

        Args:
            most: The longest name allowed, in bytes.
        """
        self._take("{")
        first = True
        while self._peek() != "}" or not first:
            name = self.value(most)
            if not isinstance(name, str):
                raise self._wrong("a name is not text")
            self._take(":")
            yield name
            first = False
            if self._peek() != ",":
                break
            self._at += 1
        self._take("}")

    def value(self, most: int) -> Any:
        """Parse the value that begins here.

        Args:
            most: The longest value allowed, in bytes. A longer one raises what ``error`` makes.
        """
        self._peek()
        size = _WINDOW
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except (json.JSONDecodeError, RecursionError) as error:
                if self._stop == len(self._data) or isinstance(error, RecursionError):
                    raise self._wrong(getattr(error, "msg", "nested too deeply")) from error
            else:
                # At the end of a window a number may go on, at most so: 1|e+5.
                if end + 3 <= len(self._text) or self._stop == len(self._data):
                    self._at = end
                    return value
            if self._at == 0 and len(self._text) >= most:
                raise self._wrong(f"a value is longer than {most} bytes")
            if self._at == 0:
                size *= 2
            self._decode(size)

    def is_object(self) -> bool:
        """Return whether an object begins here."""
        return self._peek() == "{"

    def end(self) -> None:
        """Raise unless the text ends here."""
        if self._peek():
            raise self._wrong("something follows")

    def _peek(self) -> str:
        """Return the next character that is not white space, "" at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if self._stop == len(self._data):
                return ""
            self._decode(_WINDOW)

    def _take(self, character: str) -> None:
        if self._peek() != character:
            raise self._wrong(f"{character!r} is missing")
        self._at += 1

    def _place(self) -> int:
        """Return the position in bytes."""
        passed = self._text[: self._at]
        return self._start + (self._at if passed.isascii() else len(passed.encode()))

    def _decode(self, size: int) -> None:
        """Move the window to the ``size`` bytes from the position on."""
        start = self._place()
        data = self._data[start : start + size]
        final = start + size >= len(self._data)
        try:
            text, length = codecs.utf_8_decode(data, "strict", final)
        except UnicodeDecodeError as error:
            raise self._wrong("it is not UTF-8") from error
        self._text, self._start, self._stop, self._at = text, start, start + length, 0

    def _wrong(self, what: str) -> Exception:
        return self._error(f"{what}, at byte {self._place()}")

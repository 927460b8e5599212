"""What sources are called: for people, logs and files without secrets, and for caches so that no
two objects have one name."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from datetime import date, timedelta
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

__all__ = ["display_name", "identity", "split_chain", "with_user", "without_password"]


def without_password(url: str) -> str:
    """The URL without user and password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def with_user(url: str, user: str | None = None) -> str:
    """The URL with its user (or the one that is given), without a password. Servers may show
    each user something else under one path."""
    try:
        parts = urlsplit(url)
    except ValueError:  # no URL, whatever it looks like
        return url
    found, at, host = parts.netloc.rpartition("@")
    name = found.partition(":")[0] + at if user is None else quote(user, safe="") + "@"
    return urlunsplit(parts._replace(netloc=name + host))


def identity(name: str, settings: Mapping[str, Any], ignored: Iterable[str] = ()) -> str | None:
    """What names an object for a cache, for ever: ``name``, and a digest of the settings that may
    choose another object under that name (endpoint, account, headers, ...).

    Settings that are None and those in ``ignored`` (secrets that only prove who one is, timeouts)
    do not count. One that is not plain data (a session, a function) could mean anything: then
    the result is None, and the object has no name that lasts.
    """
    left_out = set(ignored)
    chosen = {
        key: value
        for key, value in settings.items()
        if value is not None and key.lower() not in left_out
    }
    if not chosen:
        return name
    try:
        text = json.dumps(_plain_data(chosen), sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return None
    return f"{name}#{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _plain_data(value: Any) -> Any:
    """As JSON can write it. Raises TypeError for what is more than its value."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        # As a list, so that a key of text and a number are not one.
        return ["map", sorted((repr(key), _plain_data(item)) for key, item in value.items())]
    if isinstance(value, (list, tuple)):
        return ["list", *map(_plain_data, value)]
    if isinstance(value, (set, frozenset)):
        return ["set", *sorted(json.dumps(_plain_data(item)) for item in value)]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", value.hex()]
    if isinstance(value, os.PathLike):
        return ["path", os.path.abspath(os.fsdecode(value))]
    if isinstance(value, date | timedelta):
        return [type(value).__name__, str(value)]
    raise TypeError(f"{type(value).__name__} is not plain data")


#: Between the URLs of a chain of fsspec; an address of IPv6 has such colons too.
_CHAIN = re.compile(r"::(?=[A-Za-z][A-Za-z0-9+.-]*(?:://|::|$))")


def split_chain(url: str) -> list[str]:
    """The URLs of a chain of fsspec; of any other URL itself alone."""
    return _CHAIN.split(url)


def display_name(key: str) -> str:
    """For people: the key without what may be secret, which a password is, and a signature in a
    query."""
    if "://" not in key or key.startswith("concat:"):
        return key if "?" not in key else key.partition("?")[0] + "?..."
    return "::".join(map(_without_secrets, split_chain(key)))


def _without_secrets(url: str) -> str:
    try:
        parts = urlsplit(without_password(url))
    except ValueError:  # no URL, whatever it looks like
        return re.sub("//.*@", "//", url.partition("?")[0])
    return urlunsplit(parts._replace(query="...")) if parts.query else urlunsplit(parts)

"""What sources are called where people, logs and files can see it: without secrets."""

from __future__ import annotations

import re
from urllib.parse import urlsplit, urlunsplit

__all__ = ["display_name", "split_chain", "without_password"]


def without_password(url: str) -> str:
    """The URL without user and password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


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

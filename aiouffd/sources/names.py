"""What sources are called where people, logs and files can see it: without secrets."""

from __future__ import annotations

from urllib.parse import urlsplit, urlunsplit

__all__ = ["display_name", "without_password"]


def without_password(url: str) -> str:
    """The URL without user and password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def display_name(key: str) -> str:
    """For people: the key without what may be secret, which a signature in a query is."""
    if "://" not in key or key.startswith("concat:"):
        return key if "?" not in key else key.partition("?")[0] + "?..."
    parts = urlsplit(key)
    return urlunsplit(parts._replace(query="...")) if parts.query else key

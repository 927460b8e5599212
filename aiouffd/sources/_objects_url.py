"""From a URL and the environment to one of obstore's stores and a path in it.

obstore reads credentials, region and endpoint from the environment itself. What it does not
do is to keep the environment's settings for HTTP once some are given in the program: here both
count, and defaults come last.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import unquote, urlsplit

from ..errors import UsageError
from ._objects_errors import redacted
from .names import identity, with_user

__all__ = ["Location", "Settings", "cache_key", "environment", "locate", "make_store"]

#: Of a request: to connect, without a byte, and from beginning to end. The last is long, because
#: many requests share a slow line; and idle connections are given back after a while.
CLIENT_DEFAULTS = {
    "connect_timeout": "10s",
    "read_timeout": "30s",
    "timeout": "10m",
    "pool_idle_timeout": "30s",
}
#: Options of the HTTP client that obstore takes from the environment, behind the store's prefix.
_FROM_ENVIRONMENT = (
    *CLIENT_DEFAULTS,
    "allow_http",
    "allow_invalid_certificates",
    "http1_only",
    "http2_only",
    "proxy_url",
    "proxy_excludes",
    "user_agent",
)
#: Retrying is the failure policy's: it knows who waits, and for how long he may.
RETRY_DEFAULTS: dict[str, Any] = {"max_retries": 0, "retry_timeout": timedelta(seconds=10)}

#: Settings that prove who one is, but do not say it.
_SECRETS = (
    "secret_access_key",
    "session_token",
    "account_key",
    "sas_key",
    "bearer_token",
    "token",
    "client_secret",
)
#: Options of the HTTP client that say how to ask, and not what.
_HOW = (
    *_FROM_ENVIRONMENT,
    "connect_timeout",
    "pool_max_idle_per_host",
    "http2_keep_alive_interval",
    "http2_keep_alive_timeout",
    "http2_keep_alive_while_idle",
    "http2_max_frame_size",
    "proxy_ca_certificate",
    "randomize_addresses",
    "root_certificate",
    "allow_http2",
)

_BUCKETS = {
    "s3": ("S3Store", "AWS", "versionId"),
    "gs": ("GCSStore", "GOOGLE", "generation"),
    "az": ("AzureStore", "AZURE", "versionid"),
}


@dataclass(frozen=True)
class Location:
    """A URL taken apart: which store, and the path of the object in it."""

    scheme: str
    #: Bucket, container, or for HTTP the whole URL.
    place: str
    path: str
    version_id: str | None
    #: For people: no password, no query.
    name: str


@dataclass(frozen=True)
class Settings:
    """What the caller wants to have otherwise."""

    config: Mapping[str, Any] | None = None
    client_options: Mapping[str, Any] | None = None
    retry_config: Mapping[str, Any] | None = None
    credential_provider: Any = None


def locate(url: str) -> Location:
    """Take a URL apart. Raises UsageError for what names no object."""
    scheme, separator, rest = url.removeprefix("obstore+").partition("://")
    scheme = scheme.lower()
    if separator and scheme in _BUCKETS:
        return _in_bucket(scheme, rest)
    if separator and scheme in ("http", "https"):
        if not urlsplit(f"http://{rest}").hostname:
            raise UsageError(f"obstore+{scheme}:// without a host")
        return Location(scheme, f"{scheme}://{rest}", "", None, redacted(f"{scheme}://{rest}"))
    if separator and scheme == "file":
        path = unquote(rest.removeprefix("localhost"))
        if not path.startswith("/"):
            raise UsageError("obstore+file:// takes an absolute path of this machine")
        return Location(scheme, "/", path.lstrip("/"), None, f"file://{path}")
    raise UsageError(
        f"obstore has no store for {scheme or 'that'}://",
        hint="s3://, gs://, az://, obstore+http(s):// and obstore+file:// name objects; any other"
        " store can be given as ObjectSource(store, path)",
    )


def _in_bucket(scheme: str, rest: str) -> Location:
    # Keys are taken as they are, as everybody does: a % in them is a %, and a ? is one, too,
    # unless it begins exactly what names a version.
    parameter = _BUCKETS[scheme][2]
    match = re.fullmatch(rf"(?s)(.*)\?{parameter}=([^?&=/]+)", rest)
    rest, version = (match[1], match[2]) if match else (rest, None)
    bucket, _, key = rest.partition("/")
    if not bucket or not key:
        raise UsageError(f"{scheme}://{rest} names no object: write {scheme}://bucket/key")
    return Location(scheme, bucket, key, version, f"{scheme}://{bucket}/{key}")


def make_store(location: Location, settings: Settings) -> Any:
    """The store for a URL. Raises UsageError for settings that obstore does not know."""
    from obstore import exceptions

    # Its types are exact about dictionaries of which the caller gives us any.
    stores: Any = importlib.import_module("obstore.store")

    given = {
        "config": settings.config,
        "credential_provider": settings.credential_provider,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if location.scheme == "file" and not settings.client_options and not given:
        return stores.LocalStore(location.place)
    if location.scheme not in _BUCKETS and given:
        raise UsageError(f"{location.scheme}:// takes no {' and no '.join(given)}")
    retry = {**RETRY_DEFAULTS, **(settings.retry_config or {})}
    try:
        if location.scheme not in _BUCKETS:
            client = {**CLIENT_DEFAULTS, "allow_http": True, **(settings.client_options or {})}
            return stores.HTTPStore(location.place, client_options=client, retry_config=retry)
        factory, prefix, _ = _BUCKETS[location.scheme]
        client = {**_client_options(prefix), **(settings.client_options or {})}
        return getattr(stores, factory)(
            location.place, client_options=client, retry_config=retry, **given
        )
    except (ValueError, TypeError, exceptions.BaseError) as exc:
        raise UsageError(f"{location.name}: {redacted(str(exc))}") from None


def _client_options(prefix: str) -> dict[str, Any]:
    """The defaults, and the environment over them."""
    options: dict[str, Any] = dict(CLIENT_DEFAULTS)
    for name in _FROM_ENVIRONMENT:
        for key in (f"{prefix}_{name}".upper(), f"{prefix}_{name}".lower()):
            if key in os.environ:
                options[name] = os.environ[key]
    return options


def environment(location: Location) -> dict[str, str]:
    """What the environment says of this kind of store now, which is when obstore reads it."""
    prefix = _BUCKETS[location.scheme][1] if location.scheme in _BUCKETS else None
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if prefix is not None and name.upper().startswith(f"{prefix}_")
    }


def cache_key(
    location: Location,
    config: Mapping[str, Any],
    settings: Settings,
    environment: Mapping[str, str],
) -> str | None:
    """What names the object for a cache: everything that chooses it. None if that is more than
    can be written down. ``config`` is that of the store that `make_store` made of it."""
    client = dict(settings.client_options or {})
    headers = client.pop("default_headers", None)
    chosen: dict[str, Any] = {}
    name = location.name
    if location.scheme in _BUCKETS:
        chosen = {**_of_environment(location, environment), **_config(config)}
        # Buckets of AWS are one name space, which other stores may divide by account.
        if location.scheme == "s3" and not any("endpoint" in key for key in chosen):
            if "session_token" in chosen:
                # Of a role, which gets another one every hour.
                chosen.pop("access_key_id", None)
        elif location.scheme == "s3" and settings.credential_provider is not None:
            return None
    elif location.scheme != "file":
        name = with_user(location.place)  # the query counts
    chosen.update({key: value for key, value in client.items() if key.lower() not in _HOW})
    return identity(name, {**chosen, "default_headers": headers or None}, _SECRETS)


def _config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A store's settings by obstore's own names for them, but for what the URL says."""
    return {key: value for key, value in config.items() if key not in ("bucket", "container_name")}


def _of_environment(location: Location, environment: Mapping[str, str]) -> dict[str, Any]:
    """The same for what the environment adds."""
    from obstore import exceptions

    stores: Any = importlib.import_module("obstore.store")
    factory, prefix, _ = _BUCKETS[location.scheme]
    make = getattr(stores, factory)
    known: dict[str, str] = {}
    for name, value in environment.items():
        key = name.lower()
        try:
            make(location.place, config={key: value})
        except exceptions.UnknownConfigurationKeyError:
            continue
        except Exception:
            pass  # known, and of no use without others
        known[key] = value
    try:
        store = make(location.place, config=known)
    except Exception:
        # Two names for one setting, a file that is not there: then as they are written.
        return {key.removeprefix(f"{prefix.lower()}_"): value for key, value in known.items()}
    return _config(store.config or {})

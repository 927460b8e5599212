"""Which proxy a URL is asked through: what the environment says, read as curl and requests do.

``http_proxy``, ``https_proxy`` (for the scheme of the URL, in capitals too but for the first one
in CGI programs), ``all_proxy``, and ``no_proxy`` with names, their domains, addresses, networks in
CIDR notation, and ``*``. aiohttp can read it too, but then sends passwords from ~/.netrc as well,
and knows neither ``all_proxy`` nor networks.
"""

from __future__ import annotations

import ipaddress
from urllib import request
from urllib.parse import urlsplit

from ..errors import UnsupportedError

__all__ = ["checked_proxy", "proxy_for"]


def proxy_for(url: str) -> str | None:
    """The URL of the proxy that the environment has for ``url``, or None. Raises UnsupportedError
    as `checked_proxy`."""
    proxies = request.getproxies_environment()
    if not proxies:
        return None
    parts = urlsplit(url)
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy:
        return None
    host = parts.hostname or ""
    # Not in typeshed, but as old as the other one, and used by requests.
    excepted = request.proxy_bypass_environment  # type: ignore[attr-defined]
    if excepted(host, proxies) or (parts.port and excepted(f"{host}:{parts.port}", proxies)):
        return None
    if _in_network(host, proxies.get("no", "")):
        return None
    return checked_proxy(proxy if "://" in proxy else f"http://{proxy}")


def checked_proxy(proxy: str) -> str:
    """Return the URL of a proxy. Raises UnsupportedError for one that does not speak HTTP."""
    scheme = proxy.partition("://")[0].lower()
    if scheme not in ("http", "https"):
        raise UnsupportedError(
            f"a proxy that speaks {scheme} cannot be used, only HTTP proxies can",
            hint="name another one with proxy=, use none with proxy='', or put the host into"
            " no_proxy",
        )
    return proxy


def _in_network(host: str, excepted: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    for item in excepted.split(","):
        try:
            if address in ipaddress.ip_network(item.strip(), strict=False):
                return True
        except ValueError:
            continue
    return False

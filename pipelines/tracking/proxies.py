"""Answers that are not MLflow's: those of a proxy, a login page or another server."""

import re
from urllib.parse import urlsplit

from requests.utils import get_environ_proxies, select_proxy

from pipelines.errors import without_credentials

REFUSAL = re.compile(r"Tunnel connection failed: (4\d\d[^')\"]*)")
"""How a proxy refuses to connect to an https address."""
STATUS = re.compile(r"failed with error code (\d+)")
IS_HTML = "Response body: '<"
IS_OTHER_FORMAT = "not in a valid JSON format"


def proxy_of(uri: str) -> str | None:
    """Return the proxy that the environment sets for an address, without its account; or None."""
    if urlsplit(uri).scheme not in ("http", "https"):
        return None
    proxy = select_proxy(uri, get_environ_proxies(uri))
    return None if proxy is None else without_credentials(proxy)


def foreign_answer(text: str, uri: str) -> str | None:
    """Return who answered instead of MLflow, and the fix; None if MLflow or nobody did.

    Args:
        text: the complete error of MLflow's client.
        uri: address of the server.
    """
    refusal = REFUSAL.search(text)
    if refusal is not None:
        return f"the proxy refuses the connection ({refusal.group(1).strip()}){proxy_hint(uri)}"
    if IS_HTML not in text and IS_OTHER_FORMAT not in text:
        return None
    status = STATUS.search(text)
    code = status.group(1) if status else "200"
    return (
        f"the answer is not from MLflow's API (status {code}, no JSON); it may be that of a proxy, "
        f"a login page or another server. Check the address{proxy_hint(uri)}"
    )


def proxy_hint(uri: str) -> str:
    """Return how to avoid the proxy of an address; empty without a proxy."""
    proxy = proxy_of(uri)
    if proxy is None:
        return ""
    host = urlsplit(uri).hostname
    return (
        f"; requests to {host} go through the proxy {proxy}: set NO_PROXY={host} to reach it "
        "directly, or correct HTTP_PROXY and HTTPS_PROXY"
    )

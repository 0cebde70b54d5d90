"""Who may use a server: this host, or whoever has the API key."""

import hmac
import ipaddress
import os
from pathlib import Path

from pipelines.errors import PipelineError

API_KEY = "LORA_API_KEY"
MIN_KEY = 16
"""Characters of an API key."""
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]", "::1")
"""Names of this host in the Host header of a request.

Without a key, other names are refused: a page in a browser could resolve its own name to this host.
"""


def read_api_key(file: str) -> str | None:
    """Return the API key; None if none is configured.

    Args:
        file: with the key; empty for that of the environment variable LORA_API_KEY.

    Raises:
        PipelineError: the file cannot be read, or the key is too short or has other characters.
    """
    key = os.environ.get(API_KEY, "")
    source = API_KEY
    if file:
        source = file
        try:
            key = Path(file).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise PipelineError(
                f"the API key in {file} cannot be read ({type(error).__name__}); name a text file "
                "that has only the key"
            ) from error
    elif not key:
        return None
    if len(key) < MIN_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise PipelineError(
            f"the API key of {source} has {len(key)} characters; use at least {MIN_KEY} printable "
            "ASCII characters without a space, such as those of `openssl rand -hex 24`"
        )
    return key


def check_binding(host: str, key: str | None) -> None:
    """Refuse an address that other hosts can reach unless requests need a key.

    Raises:
        PipelineError: see above.
    """
    if key is None and not is_loopback(host):
        raise PipelineError(
            f"--host {host} can be reached from other hosts, and no API key is configured; set "
            f"{API_KEY} or --api-key-file, or listen on 127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Return whether an address is one of this host only; a name that is not an address is not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_authorized(header: str, key: str) -> bool:
    """Return whether the Authorization header has the key; the comparison takes constant time."""
    return hmac.compare_digest(header.encode(), f"Bearer {key}".encode())

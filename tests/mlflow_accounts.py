"""An MLflow server with accounts: its settings, and requests as one of its users."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ADMIN = "admin"
ADMIN_PASSWORD = "a password of 20 letters"
SERVER_OPTIONS = ("--app-name", "basic-auth")
Passwords = Mapping[str, str]
"""User → password."""


def server_environment(
    folder: Path, *, default_permission: str = "NO_PERMISSIONS"
) -> dict[str, str]:
    """Write the settings of the accounts; return the environment of a server that uses them."""
    settings = folder / "basic_auth.ini"
    settings.write_text(
        "[mlflow]\n"
        f"default_permission = {default_permission}\n"
        f"database_uri = sqlite:///{folder / 'accounts.db'}\n"
        f"admin_username = {ADMIN}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        # without it each of hundreds of requests takes a third of a second
        "auth_cache_ttl_seconds = 60\n"
    )
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(settings),
        "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN_PASSWORD,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "a key for tests",
    }


@contextmanager
def logged_in(user: str, password: str) -> Iterator[None]:
    """Send the requests of a block as a user."""
    names = {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": password}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def read_passwords(file: Path) -> dict[str, str]:
    """Return user → password of a file that `lora registry roles` wrote."""
    found = {}
    for line in file.read_text().splitlines():
        user, _, password = line.partition(":")
        found[user] = password
    return found

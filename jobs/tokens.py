"""Ray's token authentication: what it needs of this process's environment
(https://docs.ray.io/en/latest/ray-security/token-auth.html)."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def for_own_cluster(say: Callable[[str], None]) -> None:
    """Set a token for this run alone where ~/.ray cannot be written, into which Ray would put one."""
    if any(name in os.environ for name in _VARIABLES):
        return
    try:
        folder = Path.home() / ".ray"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK) or (folder / "auth_token").is_file():
            return
    except (OSError, RuntimeError):
        pass
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    say(
        f"HOME ({os.environ.get('HOME', 'not set')}) cannot be written, so the token of the local Ray is this run's "
        "alone; set RAY_AUTH_TOKEN_PATH to a file with a token to keep it"
    )


def why_not_joined(address: str) -> str:
    """What to do where a cluster answers and turns this program away."""
    mode = os.environ.get("RAY_AUTH_MODE", "not set")
    token = next((name for name in _VARIABLES[1:] if name in os.environ), "~/.ray/auth_token")
    return (
        f"{address} answers, but does not let this program in. A cluster wants a token where RAY_AUTH_MODE=token was "
        "set or ~/.ray/auth_token lay on its machine when it was started; then set RAY_AUTH_MODE=token (it is "
        f"{mode}) and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to its token (now read from {token})"
    )

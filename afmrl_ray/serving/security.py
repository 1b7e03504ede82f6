"""Authentication by API keys, of which only SHA-256 digests are stored."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from afmrl_ray.config.serving import AuthConfig
from afmrl_ray.errors import ConfigError
from afmrl_ray.serving.errors import Problem

KEYS_VARIABLE = "AFMRL_API_KEYS_FILE"
ROLES = ("user", "admin")
_LINE = re.compile(r"^([A-Za-z0-9._-]+):(user|admin):([0-9a-f]{64})$")


@dataclass(frozen=True)
class Caller:
    """Who sent a request; `name` is None for requests from this machine without a key."""

    name: str | None
    admin: bool


class Keys:
    """The API keys of a deployment.

    Args:
        digests: (name, role) by the key's SHA-256.
        anonymous_on_loopback: see `AuthConfig`.
    """

    def __init__(self, digests: Mapping[str, tuple[str, str]], *, anonymous_on_loopback: bool) -> None:
        self._digests = dict(digests)
        self._anonymous = anonymous_on_loopback

    @classmethod
    def read(cls, config: AuthConfig) -> Keys:
        """Read the file of keys.

        Raises:
            ConfigError: no file is named and anonymous requests are not allowed, or a line of the file is not a key.
        """
        path = config.keys_file or os.environ.get(KEYS_VARIABLE)
        if path is None:
            if not config.anonymous_on_loopback:
                raise ConfigError(
                    f"auth.keys_file is not set, nor is {KEYS_VARIABLE}: make a key with jobs/api_key.py, or set "
                    "auth.anonymous_on_loopback=true to serve this machine only"
                )
            return cls({}, anonymous_on_loopback=True)
        try:
            with open(path, encoding="utf-8") as file:
                lines = [line.strip() for line in file if line.strip() and not line.startswith("#")]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"auth.keys_file: {path} cannot be read ({error})") from error
        found: dict[str, tuple[str, str]] = {}
        for number, line in enumerate(lines, 1):
            match = _LINE.match(line)
            if match is None:
                raise ConfigError(f"auth.keys_file: {path}, key {number} is not name:role:sha256, see jobs/api_key.py")
            found[match[3]] = match[1], match[2]
        if not found:
            raise ConfigError(f"auth.keys_file: {path} contains no key; make one with jobs/api_key.py")
        return cls(found, anonymous_on_loopback=config.anonymous_on_loopback)

    def caller(self, authorization: str | None, host: str | None) -> Caller:
        """Who sent a request.

        Args:
            authorization: header.
            host: address that the request came from.

        Raises:
            Problem: 401, the key is missing or unknown.
        """
        if authorization is None:
            if self._anonymous and _is_loopback(host):
                return Caller(None, admin=True)
            raise Problem(401, "an API key is required: Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"})
        scheme, _, key = authorization.partition(" ")
        given = digest(key.strip())
        for known, (name, role) in self._digests.items():
            if scheme.lower() == "bearer" and hmac.compare_digest(known, given):
                return Caller(name, admin=role == "admin")
        if self._anonymous and not self._digests and _is_loopback(host):
            # Some clients, such as OpenAI's, always send a key.
            return Caller(None, admin=True)
        raise Problem(401, "the API key is unknown", {"WWW-Authenticate": "Bearer"})


def digest(key: str) -> str:
    """SHA-256 of a key, hexadecimal; a key is long and random, so a slow hash would add nothing."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def new_key(name: str, role: str) -> tuple[str, str]:
    """A new key, and its line of the file.

    Raises:
        ConfigError: the name has other characters than letters, digits, dots, dashes and underscores.
    """
    key = "afmrl-" + secrets.token_urlsafe(32)
    line = f"{name}:{role}:{digest(key)}"
    if _LINE.match(line) is None:
        raise ConfigError(f"{name!r} is not a valid name of a key: use letters, digits, dots, dashes and underscores")
    return key, line


def _is_loopback(host: str | None) -> bool:
    try:
        return host is not None and ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

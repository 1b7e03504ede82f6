"""Removal of credentials from values that are logged or stored."""

from __future__ import annotations

import re
from typing import Any

_CREDENTIALS = re.compile(r"(?<=://)[^/?#\s]+@")


def without_credentials(value: Any) -> Any:
    """A text or JSON value with user name and password in its URIs replaced by `***`."""
    if isinstance(value, dict):
        return {key: without_credentials(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_credentials(inner) for inner in value]
    return _CREDENTIALS.sub("***@", value) if isinstance(value, str) else value

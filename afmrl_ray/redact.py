"""What is shown or handed on, without what opens a door."""

from __future__ import annotations

import re
from typing import Any

_CREDENTIALS = re.compile(r"(?<=://)[^/?#\s]+@")


def without_credentials(value: Any) -> Any:
    """The same text or JSON value with `***` for user name and password in its URIs."""
    if isinstance(value, dict):
        return {key: without_credentials(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_credentials(inner) for inner in value]
    return _CREDENTIALS.sub("***@", value) if isinstance(value, str) else value

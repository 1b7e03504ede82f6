"""Access to the model below PEFT's wrapper."""

from __future__ import annotations

from typing import Any


def unwrap_model(model: Any) -> Any:
    """The Hugging Face model below PEFT's wrapper, or `model` itself if it is not wrapped."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model

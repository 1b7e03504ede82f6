"""From what a training holds to the model inside."""

from __future__ import annotations

from typing import Any


def inner_model(model: Any) -> Any:
    """The `ForConditionalGeneration` model itself, whether it is wrapped by PEFT or not."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model

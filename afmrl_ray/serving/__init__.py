"""The serving application; see `app.app_builder`."""

from __future__ import annotations

from afmrl_ray.serving.app import app_builder

__all__ = ["app_builder"]

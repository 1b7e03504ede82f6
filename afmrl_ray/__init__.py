"""AFMRL: an attribute generator and a multimodal encoder that improve one another, trained on Ray."""

from __future__ import annotations

__version__ = "0.1.0"

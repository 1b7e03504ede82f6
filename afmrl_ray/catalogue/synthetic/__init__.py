"""The synthetic catalogue: families of near-identical products, offered by sellers with incomplete titles."""

from __future__ import annotations

from afmrl_ray.catalogue.synthetic.make import make_catalogue

__all__ = ["make_catalogue"]

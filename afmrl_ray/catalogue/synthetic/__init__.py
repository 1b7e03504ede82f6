"""The synthetic catalogue: families of near-identical products, listed by careless sellers."""

from __future__ import annotations

from afmrl_ray.catalogue.synthetic.make import make_catalogue

__all__ = ["make_catalogue"]

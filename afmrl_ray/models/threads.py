"""Torch threads of workers and actors."""

from __future__ import annotations


def torch_threads(cpus: float) -> int:
    """Number of torch threads of an actor that holds `cpus` CPUs: at least one."""
    return max(1, int(cpus))

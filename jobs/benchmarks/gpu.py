"""Timing on a device that works asynchronously."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def timed(step: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each of `repeats` steps, after two warm-up steps."""
    found = []
    for repeat in range(repeats + 2):
        _wait(device)
        began = time.perf_counter()
        step()
        _wait(device)
        if repeat >= 2:
            found.append(time.perf_counter() - began)
    return found


def device_name(device: torch.device) -> str:
    """Name of the GPU, or `CPU`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()

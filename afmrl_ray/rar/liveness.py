"""Waiting for an actor that Ray starts again: until then, calls to it fail at once instead of waiting."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from ray.exceptions import ActorDiedError, RayActorError

_PAUSE_S = 0.25


async def wait_for_return(actor: Any, timeout_s: float) -> bool:
    """Whether an actor answers again within `timeout_s` seconds; False at once if it will never.

    Args:
        actor: its handle; it has a method `pid`.
        timeout_s: longest wait.
    """
    try:
        return await wait_for_answer(actor, timeout_s)
    except ActorDiedError:
        return False


async def wait_for_answer(actor: Any, timeout_s: float) -> bool:
    """Whether an actor answers within `timeout_s` seconds, however often Ray starts it again meanwhile.

    Args:
        actor: its handle; it has a method `pid`.
        timeout_s: longest wait.

    Raises:
        ActorDiedError: it will never, as when it fails to begin.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        answer = asyncio.wrap_future(actor.pid.remote().future())
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.wait([answer], timeout=deadline - time.monotonic())
        if not answer.done():
            return False
        error = answer.exception()
        if isinstance(error, ActorDiedError):
            raise error
        if not isinstance(error, RayActorError):
            return error is None
        if time.monotonic() + _PAUSE_S > deadline:
            return False
        await asyncio.sleep(_PAUSE_S)

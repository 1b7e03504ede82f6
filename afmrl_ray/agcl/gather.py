"""All-gather of the candidates of all workers, with exact gradients.

Let rank r hold x_r and compute its own loss L_r from all of X = [x_0, ..., x_{W-1}]; the loss of the whole batch is
L = (1/W) sum_r L_r. Its gradient is (1/W) sum_s (sum_r dL_r/dx_s) dx_s/dtheta. Backward of the gather sums dL_r/dx_s
over the ranks r and gives the sum to its owner s (reduce-scatter), which continues with dx_s/dtheta; an engine that
averages parameter gradients over the ranks s then supplies the 1/W. So the result is dL/dtheta exactly, without a
manual world-size factor. The popular shortcut (gather without gradient, insert the local slice) omits every dL_r/dx_s
with r != s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def gather_with_gradient(x: Tensor) -> Tensor:
    """Concatenate `x` of all ranks in rank order; differentiable.

    Args:
        x: [B, D], of the same shape on every rank; all ranks must call, in forward and in backward.

    Returns:
        [W * B, D]; `x` itself with one rank or without a process group.
    """
    return _Gather.apply(x) if _world_size() > 1 else x


@torch.no_grad()
def gather_plain(x: Tensor) -> Tensor:
    """Concatenate `x` [B, ...] of all ranks in rank order to [W * B, ...], without gradient."""
    return _all_gather(x) if _world_size() > 1 else x.detach()


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _all_gather(x: Tensor) -> Tensor:
    out = x.new_empty((dist.get_world_size() * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(out, x.contiguous())
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _all_gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous()
        own = grad.new_empty((grad.shape[0] // dist.get_world_size(), *grad.shape[1:]))
        dist.reduce_scatter_tensor(own, grad, op=dist.ReduceOp.SUM)
        return own

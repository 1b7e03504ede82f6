"""Extension of vLLM's workers: loading trained tensors from a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from safetensors.torch import load_file

from afmrl_ray.rar.vllm_weights import checkpoint_name
from afmrl_ray.rar.weights import weights_fingerprint


class TrainedTensors:
    """Mixed into vLLM's worker class (`worker_extension_cls`); called with `LLM.collective_rpc`."""

    get_model: Callable[[], Any]

    def load_trained_tensors(self, path: str) -> str:
        """Load tensors into the worker's shard of the model, in place.

        Args:
            path: safetensors file with the policy's names.

        Returns:
            Fingerprint of what was loaded.
        """
        tensors = load_file(path)
        self.get_model().load_weights((checkpoint_name(name), tensor) for name, tensor in tensors.items())
        return weights_fingerprint(tensors)

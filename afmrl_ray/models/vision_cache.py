"""Cache on the node's disk for outputs of a frozen vision tower, so that each image passes the tower once.

One safetensors file per image, named by the hash of the encoded image, in a folder named by the fingerprint of the
tower and of the image processor's settings: a change of either uses another folder. Each image passes the tower in a
batch of its own, so its output has the same bits in every process and step.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from afmrl_ray import storage
from afmrl_ray.catalogue.images import DECODING
from afmrl_ray.config.models import VisionCacheConfig
from afmrl_ray.errors import ConfigError
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.model_input import Visual
from afmrl_ray.models.unwrap import unwrap_model

log = logging.getLogger(__name__)

_WRITES_BETWEEN_CHECKS = 64
"""Files written by a process between two checks of the cache's size."""
_KEPT_FRACTION = 0.9
"""Size after a removal, relative to the limit, so that not every check has to remove files."""


class VisionCache:
    """Visual tokens by image.

    Args:
        model: the encoder; its vision tower must be frozen.
        processor: makes the patches of an image that is not cached.
        config: folder and size limit.

    Raises:
        ConfigError: the vision tower is trained.
    """

    def __init__(self, model: Any, processor: ItemProcessor, config: VisionCacheConfig) -> None:
        self._tower = unwrap_model(model).model.visual
        if any(parameter.requires_grad for parameter in self._tower.parameters()):
            raise ConfigError(
                "encoder.vision_cache.enabled: agcl.adapter trains the vision tower, so its outputs change with every "
                "step; set it to false, or exclude the tower from agcl.adapter"
            )
        self._processor = processor
        self._root = Path(config.folder or storage.user_cache("vision"))
        self._limit = int(config.max_gb * 1e9)
        self._folder = self._root / fingerprint(self._tower, processor)
        self._writes = 0
        self._writable = True
        self.hits = self.misses = 0

    def visual(self, data: bytes, image: Callable[[], Image.Image]) -> Visual:
        """Visual tokens of an image.

        Args:
            data: the encoded image, whose hash is the key.
            image: decodes it; called if it is not cached.
        """
        name = hashlib.sha256(data).hexdigest()
        path = self._folder / name[:2] / f"{name}.safetensors"
        found = _read(path)
        if found is not None:
            self.hits += 1
            return found
        self.misses += 1
        patches = self._processor.visual(image())
        visual = Visual(patches.grid, features=self._through_tower(patches))
        if self._writable:
            self._write(path, visual)
        return visual

    @torch.no_grad()
    def _through_tower(self, visual: Visual) -> torch.Tensor:
        assert visual.patches is not None
        assert visual.pixels is not None
        parameter = next(self._tower.parameters())
        pixels = visual.pixels.values(torch.from_numpy(visual.patches).to(parameter.device))
        grid = torch.tensor([visual.grid], device=parameter.device)
        return self._tower(pixels.to(parameter.dtype), grid_thw=grid).pooler_output.cpu()

    def _write(self, path: Path, visual: Visual) -> None:
        if self._writes % _WRITES_BETWEEN_CHECKS == 0:
            self._remove_oldest()
        self._writes += 1
        assert visual.features is not None
        content = save({"features": visual.features.contiguous()}, {"grid": json.dumps(visual.grid)})
        partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            partial.write_bytes(content)
            os.replace(partial, path)
        except OSError as error:
            # The cache only saves time: a training must not fail because of it.
            self._writable = False
            log.warning("encoder.vision_cache.folder %s: nothing more is written (%s)", self._root, error.strerror)
            partial.unlink(missing_ok=True)

    def _remove_oldest(self) -> None:
        """Remove the least recently read files, of all towers together, until the cache is below its limit."""
        found = []
        for path in self._root.glob("*/*/*.safetensors"):
            try:
                status = path.stat()
            except FileNotFoundError:  # removed by another process meanwhile
                continue
            found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        if total <= self._limit:
            return
        for _, size, path in sorted(found):
            path.unlink(missing_ok=True)
            total -= size
            if total <= _KEPT_FRACTION * self._limit:
                return


def fingerprint(tower: Any, processor: ItemProcessor) -> str:
    """SHA-256 of all that visual tokens depend on: the tower's weights and config, and the processor's settings."""
    total = hashlib.sha256(
        json.dumps([tower.config.to_dict(), processor.pixel_settings(), DECODING], sort_keys=True).encode()
    )
    for name, tensor in sorted(tower.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def _read(path: Path) -> Visual | None:
    """The visual tokens at `path`; none if there is no file, or none that can be read."""
    try:
        with safe_open(path, "pt") as file:
            features = file.get_tensor("features")
            time, height, width = json.loads(file.metadata()["grid"])
        os.utime(path)
    except FileNotFoundError:
        return None
    except SafetensorError as error:
        log.warning("%s cannot be read and is computed again (%s)", path, error)
        return None
    return Visual((time, height, width), features=features)

"""Outputs of a frozen vision tower, kept on the node's disk, so that each image goes through the tower once.

One safetensors file per image, named by the hash of the encoded image below a folder named by the fingerprint of
the tower and of what its images are made of: whatever changes either looks elsewhere. Each image goes through the
tower by itself, so its output has the same bits whoever computes it and with whichever others.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import logging
import os
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from afmrl_ray.config.models import VisionCacheConfig
from afmrl_ray.errors import ConfigError
from afmrl_ray.models.inner import inner_model
from afmrl_ray.models.item_processor import ItemProcessor
from afmrl_ray.models.model_input import Visual

log = logging.getLogger(__name__)

_STORES_BETWEEN_LOOKS = 64
_KEPT_SHARE = 0.9
"""Of the limit, when the oldest are removed: so that not every image asks for a removal."""


class VisionCache:
    """Visual tokens by image.

    Args:
        model: the encoder; its tower must be frozen.
        processor: makes the patches of an image that is not there yet.
        config: where, and how much.

    Raises:
        ConfigError: the tower is trained.
    """

    def __init__(self, model: Any, processor: ItemProcessor, config: VisionCacheConfig) -> None:
        self._tower = inner_model(model).model.visual
        if any(parameter.requires_grad for parameter in self._tower.parameters()):
            raise ConfigError(
                "encoder.vision_cache.enabled: agcl.adapter trains the vision tower, so its outputs change with every "
                "step; set it to false, or leave the tower out of agcl.adapter"
            )
        self._processor = processor
        self._root = Path(config.folder or os.path.join(tempfile.gettempdir(), f"afmrl_ray-{getpass.getuser()}/vision"))
        self._limit = int(config.max_gb * 1e9)
        self._folder = self._root / fingerprint(self._tower, processor)
        self._stores = 0
        self._writable = True
        self.hits = self.misses = 0

    def visual(self, data: bytes, image: Callable[[], Image.Image]) -> Visual:
        """Visual tokens of an image.

        Args:
            data: the encoded image, by which it is known.
            image: decodes it; called where it is not there yet.
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
            self._store(path, visual)
        return visual

    @torch.no_grad()
    def _through_tower(self, visual: Visual) -> torch.Tensor:
        assert visual.patches is not None
        assert visual.pixels is not None
        parameter = next(self._tower.parameters())
        pixels = visual.pixels.values(torch.from_numpy(visual.patches).to(parameter.device))
        grid = torch.tensor([visual.grid], device=parameter.device)
        return self._tower(pixels.to(parameter.dtype), grid_thw=grid).pooler_output.cpu()

    def _store(self, path: Path, visual: Visual) -> None:
        if self._stores % _STORES_BETWEEN_LOOKS == 0:
            self._remove_oldest()
        self._stores += 1
        assert visual.features is not None
        content = save({"features": visual.features.contiguous()}, {"grid": json.dumps(visual.grid)})
        partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            partial.write_bytes(content)
            os.replace(partial, path)
        except OSError as error:
            # A training of days must not end because of what only saves it time.
            self._writable = False
            log.warning("encoder.vision_cache.folder %s: no more is kept (%s)", self._root, error.strerror)
            partial.unlink(missing_ok=True)

    def _remove_oldest(self) -> None:
        """Bring all towers' files together below the limit, those first that were not read for the longest time."""
        found = []
        for path in self._root.glob("*/*/*.safetensors"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process removes, too
                continue
            found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        if total <= self._limit:
            return
        for _, size, path in sorted(found):
            path.unlink(missing_ok=True)
            total -= size
            if total <= _KEPT_SHARE * self._limit:
                return


def fingerprint(tower: Any, processor: ItemProcessor) -> str:
    """SHA-256 of what decides an image's visual tokens: the tower's weights and config, and the pixels it is given."""
    total = hashlib.sha256(json.dumps([tower.config.to_dict(), processor.pixel_settings()], sort_keys=True).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def _read(path: Path) -> Visual | None:
    """What is at `path`; none if nothing is, or nothing that can be read."""
    try:
        with safe_open(path, "pt") as file:
            features = file.get_tensor("features")
            time, height, width = json.loads(file.metadata()["grid"])
        os.utime(path)
    except FileNotFoundError:
        return None
    except SafetensorError as error:
        log.warning("%s cannot be read and is made anew (%s)", path, error)
        return None
    return Visual((time, height, width), features=features)

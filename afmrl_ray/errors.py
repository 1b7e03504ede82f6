"""What a user can get wrong: one exception each, all `UserError`, all ended by a job with exit code 2 and one line.

Anything that is not a `UserError` is a failure of the run itself (exit code 1).
"""

from __future__ import annotations


class UserError(Exception):
    """The user's input or config is wrong; the message names the field or file and says what to do instead."""


class ConfigError(UserError):
    """A config key is unknown, a value has the wrong type or settings contradict one another."""


class CatalogueError(UserError):
    """A catalogue is missing, lacks columns, holds too many bad rows, or a split of it cannot serve its purpose."""


class CheckpointError(UserError):
    """A model path is missing, is of another architecture, or its adapter does not fit the model."""


class StorageError(UserError):
    """The storage path cannot be read or written."""


class ResourceError(UserError):
    """The cluster has fewer workers, CPUs or GPUs than the config asks for."""


class TeacherError(UserError):
    """The teacher of the distillation cannot be reached, or answers nothing usable."""


class RewardServiceError(RuntimeError):
    """More rewards failed for reasons of infrastructure than `rar.reward.max_failed_fraction` allows."""


class GalleryVersionError(RuntimeError):
    """A reward actor searched another gallery than this round's."""


class WeightSyncError(RuntimeError):
    """A rollout worker does not hold the weights that the learner pushed."""


class WeightsLostError(RuntimeError):
    """The object store no longer has the weights: the learner that exported them died, or the node that held them."""

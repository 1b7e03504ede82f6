"""Exceptions of the package.

A job reports a `UserError` in one line and exits with code 2. Every other exception is a failure of the run (exit code
1).
"""

from __future__ import annotations


class UserError(Exception):
    """Wrong input or config; the message names the field or file and says how to fix it."""


class ConfigError(UserError):
    """A config key is unknown, a value has the wrong type, or settings contradict each other."""


class CatalogueError(UserError):
    """A catalogue is missing, lacks columns, has too many unusable rows, or lacks the items that a stage needs."""


class CheckpointError(UserError):
    """A model path is missing, has another architecture, or its adapter does not match the model."""


class StorageError(UserError):
    """The storage path cannot be read or written."""


class ResourceError(UserError):
    """The cluster has fewer workers, CPUs or GPUs than the config asks for."""


class TeacherError(UserError):
    """The distillation teacher cannot be reached, or its answers are unusable."""


class RewardServiceError(RuntimeError):
    """A greater fraction of rewards failed (timeout, dead actor) than `rar.reward.max_failed_fraction` allows."""


class GalleryVersionError(RuntimeError):
    """A reward actor searched the gallery of another round."""


class WeightSyncError(RuntimeError):
    """A rollout worker does not have the weights that the learner pushed."""


class WeightsLostError(RuntimeError):
    """The object store lost the weights: the learner that exported them, or the node that stored them, died."""

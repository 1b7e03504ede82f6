"""What a user can mend is told at once: dead addresses, mistakes in workers, users without a name."""

from __future__ import annotations

import getpass
import os
import socket
import time

import pytest

from afmrl_ray import storage
from afmrl_ray.config.cluster import RayConfig
from afmrl_ray.errors import CheckpointError, ConfigError, ResourceError, UserError
from afmrl_ray.training.cluster import ray_session
from afmrl_ray.training.fit import _recorded_mistake, _unless_mistaken


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize("by", ["RAY_ADDRESS", "ray.address"])
def test_an_address_where_nothing_listens_is_named_after_the_wait(monkeypatch, by):
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda *args, **kwargs: pytest.fail("Ray was asked"))
    if by == "RAY_ADDRESS":
        monkeypatch.setenv("RAY_ADDRESS", address)
    config = RayConfig(address=address if by == "ray.address" else None, wait_for_resources_s=0.2)
    began = time.monotonic()
    with (
        pytest.raises(ResourceError, match=rf"{by} {address}: nothing listens there after 0\.2 s"),
        ray_session(config),
    ):
        pass
    assert time.monotonic() - began < 30


def test_a_mistake_of_one_worker_ends_the_group_that_is_started_again(tmp_path):
    mistake, calls = str(tmp_path / "user_error.json"), []

    def loop(config):
        calls.append(config)
        raise CheckpointError("no such layer")

    with pytest.raises(CheckpointError):
        _unless_mistaken(loop, mistake, {"a": 1})
    assert _unless_mistaken(loop, mistake, {"a": 1}) is None
    assert calls == [{"a": 1}]
    found = _recorded_mistake(mistake)
    assert isinstance(found, CheckpointError)
    assert str(found) == "no such layer"


def test_other_failures_of_a_worker_are_no_mistakes(tmp_path):
    mistake = str(tmp_path / "user_error.json")

    def loop(config):
        raise RuntimeError("a node was lost")

    with pytest.raises(RuntimeError):
        _unless_mistaken(loop, mistake, {})
    assert _recorded_mistake(mistake) is None
    assert _unless_mistaken(lambda config: 7, mistake, {}) == 7


def test_a_uid_without_a_name_has_a_cache_by_its_number(monkeypatch):
    def unknown() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(getpass, "getuser", unknown)
    assert storage.user_cache("models").endswith(os.path.join(f"afmrl_ray-uid{os.getuid()}", "models"))
    assert issubclass(ConfigError, UserError)

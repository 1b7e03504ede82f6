"""Authentication and roles."""

from __future__ import annotations

import os
import stat

import pytest

from afmrl_ray.config.serving import AuthConfig, ServingConfig
from afmrl_ray.errors import ConfigError
from afmrl_ray.serving.security import Keys, new_key
from tests.serving.conftest import Application


@pytest.fixture
def keys_file(tmp_path) -> tuple[str, str, str]:
    (user, first), (admin, second) = new_key("shop", "user"), new_key("ops", "admin")
    path = tmp_path / "keys"
    path.write_text(f"# keys\n{first}\n\n{second}\n")
    return str(path), user, admin


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_roles(served_run, tmp_path, keys_file) -> None:
    path, user, admin = keys_file
    application = Application(served_run, tmp_path / "s", auth={"keys_file": path})
    item = {"item_id": "a", "title": "x", "attributes": {}}
    with application.client() as client:
        for headers, search, upsert in (({}, 401, 401), (bearer("no"), 401, 401), (bearer(user), 200, 403)):
            assert client.post("/v1/search", json={"title": "x"}, headers=headers).status_code == search
            assert client.post("/v1/items", json=item, headers=headers).status_code == upsert
            assert client.post("/admin/switch", json={}, headers=headers).status_code == upsert
            assert client.delete("/v1/items/a", headers=headers).status_code == upsert
        assert client.post("/v1/items", json=item, headers=bearer(admin)).status_code == 200
        assert client.post("/admin/switch", json={"round": 1}, headers=bearer(admin)).status_code == 200
        assert client.get("/metrics").status_code == 401
        assert client.get("/healthz").text == "ok"
        assert client.get("/").status_code == 200
        refused = client.get("/v1/model", headers={"authorization": f"Basic {user}"})
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")


def test_anonymous_requests_are_accepted_from_this_machine_only(served_run, tmp_path) -> None:
    application = Application(served_run, tmp_path)
    for host, status in (("127.0.0.1", 200), ("::1", 200), ("10.1.2.3", 401), ("testclient", 401)):
        with application.client(host=host) as client:
            assert client.get("/v1/model").status_code == status


def test_only_digests_are_stored(keys_file) -> None:
    path, user, admin = keys_file
    with open(path) as file:
        text = file.read()
    assert user not in text
    assert admin not in text


@pytest.mark.parametrize(
    ("text", "says"),
    [("", "contains no key"), ("shop:user:abc", "key 1 is not"), ("a:root:" + "0" * 64, "key 1 is not")],
)
def test_invalid_key_files_are_refused(tmp_path, text: str, says: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        Keys.read(AuthConfig(keys_file=str(path)))


def test_serving_without_keys_must_be_allowed_explicitly(monkeypatch, keys_file) -> None:
    monkeypatch.delenv("AFMRL_API_KEYS_FILE", raising=False)
    with pytest.raises(ConfigError, match=r"auth\.anonymous_on_loopback"):
        Keys.read(AuthConfig())
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys.read(AuthConfig(keys_file="/nowhere"))
    monkeypatch.setenv("AFMRL_API_KEYS_FILE", keys_file[0])
    assert Keys.read(AuthConfig()).caller(f"Bearer {keys_file[2]}", None).admin


def test_the_job_prints_a_key_and_stores_its_digest(tmp_path, capsys) -> None:
    from afmrl_ray.commands.keys import main

    path = tmp_path / "keys"
    assert main(["shop", "--role", "admin", "--file", str(path)]) == 0
    key = capsys.readouterr().out.strip()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert Keys.read(AuthConfig(keys_file=str(path))).caller(f"Bearer {key}", None).name == "shop"
    assert main(["a:b", "--file", str(path)]) == 2
    assert main(["shop", "--file", str(tmp_path)]) == 2


def test_plain_arguments_of_serve_run_with_dotted_keys_are_accepted(served_run, tmp_path) -> None:
    """As `serve run module:builder section.field=value` does."""
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build

    from afmrl_ray.serving import app_builder

    given = {"run": served_run.path, "state_dir": str(tmp_path), "auth.anonymous_on_loopback": "true", "limits.k": "7"}
    (config, *_) = build(app_builder, given)._bound_deployment.init_args
    assert isinstance(config, ServingConfig)
    assert (config.auth.anonymous_on_loopback, config.limits.k) == (True, 7)
    with pytest.raises(ConfigError, match=r"unknown config key 'limits.kk'; the nearest known key is 'limits.k'"):
        build(app_builder, {**given, "limits.kk": "7"})

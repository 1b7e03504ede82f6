"""The application on a real Ray Serve: OpenAI's client, kills, switches under load, durability across restarts."""

from __future__ import annotations

import base64
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from afmrl_ray.config.serving import ServingConfig
from afmrl_ray.errors import ConfigError
from afmrl_ray.runs import RunDirectory
from afmrl_ray.serving import app_builder
from tests.serving.conftest import image_bytes

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

SMALL = {"cpus": 0.3}
DEPLOYMENTS = ("Ingress", "Encoder", "Generator", "Index")


def settings(run: RunDirectory, state_dir: str, **more: Any) -> ServingConfig:
    values = {
        "run": run.path,
        "state_dir": state_dir,
        "auth": {"anonymous_on_loopback": True},
        **{name.lower(): SMALL for name in DEPLOYMENTS},
        **more,
    }
    return ServingConfig.model_validate(values)


class Server:
    """A running application."""

    def __init__(self, address: str) -> None:
        self.address = address

    def ask(self, method: str, path: str, body: Any = None) -> requests.Response:
        return requests.request(method, self.address + path, json=body, timeout=60)

    def search(self, title: str, **more: Any) -> requests.Response:
        return self.ask("POST", "/v1/search", {"title": title, "k": 3, "attributes_source": "none", **more})

    def kill(self, deployment: str) -> int:
        """Kill -9 a replica and wait until another one answers; its process id."""
        pid = self.pid(deployment)
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                if self.pid(deployment) != pid:
                    return pid
            except Exception:  # noqa: BLE001 - whatever a handle raises while its replica is away
                time.sleep(0.3)
        raise AssertionError(f"{deployment} did not come back")

    def pid(self, deployment: str) -> int:
        from ray import serve

        return serve.get_deployment_handle(deployment, "afmrl").pid.remote().result(timeout_s=20)


@pytest.fixture(scope="module")
def port(ray_local: None) -> Iterator[int]:
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": number})
    yield number
    serve.shutdown()


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="module")
def server(port: int, served_run: RunDirectory, state_dir: str) -> Server:
    from ray import serve

    serve.run(app_builder(settings(served_run, state_dir, round=0)), name="afmrl")
    return Server(f"http://127.0.0.1:{port}")


def deploy(file: str) -> None:
    """What `serve deploy` does, by the controller instead of the dashboard, which the session's Ray has not."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    with open(file) as opened:
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(yaml.safe_load(opened)))


class Load:
    """Searches from threads of their own, until it is left."""

    def __init__(self, server: Server, threads: int = 4) -> None:
        self.answers: list[tuple[int, Any]] = []
        self._server, self._stop = server, threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]

    def _run(self) -> None:
        while not self._stop.is_set():
            answer = self._server.search("red mug", attributes_source="generated")
            self.answers.append((answer.status_code, answer.json()))

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_the_official_openai_client_works(server: Server) -> None:
    from openai import NotFoundError, OpenAI

    client = OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)
    texts = ["a red mug", "a blue mug", "a red mug"]
    answer = client.embeddings.create(model="afmrl", input=texts)
    first, second, third = (each.embedding for each in answer.data)
    assert len(first) == server.ask("GET", "/v1/model").json()["dimensions"]
    assert first == pytest.approx(third, abs=1e-6)
    assert first != pytest.approx(second, abs=1e-3)
    assert answer.usage.total_tokens > 0
    floats = client.embeddings.create(model="afmrl", input=texts[0], encoding_format="float").data[0].embedding
    assert floats == pytest.approx(first, abs=1e-6)
    with pytest.raises(NotFoundError):
        client.embeddings.create(model="text-embedding-3-small", input="x")


def test_documentation_health_and_metrics(server: Server) -> None:
    paths = server.ask("GET", "/openapi.json").json()["paths"]
    assert {"/v1/search", "/v1/attributes", "/v1/embeddings", "/v1/items", "/v1/model", "/admin/switch"} <= set(paths)
    assert server.ask("GET", "/docs").status_code == 200
    assert server.ask("GET", "/healthz").text == "ok"
    assert "afmrl_serving_requests_total" in server.ask("GET", "/metrics").text


def test_a_search_generates_attributes_embeds_and_searches(server: Server) -> None:
    image = base64.b64encode(image_bytes()).decode()
    answer = server.search("", image=image, attributes_source="generated").json()
    assert len(answer["hits"]) == 3
    assert set(answer["milliseconds"]) == {"attributes", "embedding", "index"}
    assert answer["reason"] or answer["attributes"]


@pytest.mark.parametrize(
    "deployments", [("Index",), pytest.param(DEPLOYMENTS, marks=pytest.mark.slow)], ids=("index", "every one")
)
def test_items_survive_the_death_of_replicas(server: Server, deployments: tuple[str, ...]) -> None:
    gone = next(hit["item_id"] for hit in server.search("mug").json()["hits"] if hit["item_id"] != "kept")
    image = base64.b64encode(image_bytes("green")).decode()
    item = {"item_id": "kept", "title": "kept item", "image": image, "attributes": {"color": "green"}}
    assert server.ask("POST", "/v1/items", item).status_code == 200
    assert server.ask("DELETE", f"/v1/items/{gone}").status_code == 204
    for deployment in deployments:
        server.kill(deployment)
    answer = server.search(
        "kept item", image=image, attributes={"color": "green"}, attributes_source="given", k=100
    ).json()
    assert answer["hits"][0]["item_id"] == "kept"
    assert answer["hits"][0]["score"] == pytest.approx(1, abs=1e-5)
    assert gone not in {hit["item_id"] for hit in answer["hits"]}


@pytest.mark.slow
def test_kills_under_load_cause_no_wrong_answer(server: Server) -> None:
    wanted = server.search("red mug", attributes_source="generated").json()["hits"]
    with Load(server) as load:
        for deployment in ("Encoder", "Index", "Generator"):
            server.kill(deployment)
    statuses = Counter(status for status, _ in load.answers)
    assert set(statuses) <= {200, 503}
    assert statuses[200] > 10
    assert all(body["hits"] == wanted for status, body in load.answers if status == 200)


def test_a_switch_under_load_fails_no_request_and_mixes_no_rounds(server: Server, bundles) -> None:
    def hits(number: int) -> Any:
        assert server.ask("POST", "/admin/switch", {"round": number}).status_code == 200
        return server.search("red mug", attributes_source="generated").json()["hits"]

    wanted = {number: hits(number) for number in (1, 0)}
    assert wanted[0] != wanted[1]
    with Load(server) as load:
        for number in (1, 0, 1):
            time.sleep(0.5)
            moved = server.ask("POST", "/admin/switch", {"round": number}).json()
            assert moved["served"] == bundles[number].key
    assert Counter(status for status, _ in load.answers).keys() == {200}
    assert {body["round"] for _, body in load.answers} == {0, 1}
    assert all(body["hits"] == wanted[body["round"]] for _, body in load.answers)
    refused = server.ask("POST", "/admin/switch", {"round": 7})
    assert refused.status_code == 409
    assert "jobs/build_index.py --round 7" in refused.json()["detail"]


@pytest.mark.slow
def test_a_new_user_config_switches_to_its_round(
    server: Server, served_run: RunDirectory, state_dir: str, tmp_path: Path
) -> None:
    """As operators do it: `serve deploy` of a file whose `user_config` names another round."""
    arguments = settings(served_run, state_dir).model_dump(mode="json")

    def serving(number: int) -> None:
        application = {
            "name": "afmrl",
            "import_path": "afmrl_ray.serving:app_builder",
            "args": arguments,
            "deployments": [{"name": "Ingress", "user_config": {"round": number}}],
        }
        file = tmp_path / "serve.yaml"
        file.write_text(yaml.safe_dump({"applications": [application]}))
        deploy(str(file))
        deadline = time.monotonic() + 60
        while server.ask("GET", "/v1/model").json()["round"] != number:
            assert time.monotonic() < deadline
            time.sleep(0.2)

    serving(0)
    serving(1)


@pytest.mark.slow
def test_a_restarted_application_serves_what_it_served(
    server: Server, served_run: RunDirectory, state_dir: str
) -> None:
    from ray import serve

    before = server.ask("GET", "/v1/model").json()
    serve.delete("afmrl")
    with pytest.raises(ConfigError, match="leave round out"):
        app_builder(settings(served_run, state_dir, round=1 - before["round"]))
    serve.run(app_builder(settings(served_run, state_dir)), name="afmrl")
    after = server.ask("GET", "/v1/model").json()
    assert {name: after[name] for name in ("bundle", "items", "history")} == {
        name: before[name] for name in ("bundle", "items", "history")
    }
    assert server.ask("GET", "/v1/items/kept").json()["attributes"] == {"color": "green"}


@pytest.mark.slow
def test_full_queues_are_answered_503_with_retry_after(port: int, served_run: RunDirectory, tmp_path) -> None:
    from ray import serve

    tight = {**SMALL, "max_ongoing_requests": 1, "max_queued_requests": 1}
    serve.run(app_builder(settings(served_run, str(tmp_path), encoder=tight)), name="tight", route_prefix="/tight")
    server = Server(f"http://127.0.0.1:{port}/tight")
    answers: list[requests.Response] = []
    body = {"input": ["a mug " * 100] * 8}
    threads = [
        threading.Thread(target=lambda: answers.append(server.ask("POST", "/v1/embeddings", body))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    serve.delete("tight")
    refused = [answer for answer in answers if answer.status_code != 200]
    assert refused
    for answer in refused:
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.headers["content-type"] == "application/problem+json"

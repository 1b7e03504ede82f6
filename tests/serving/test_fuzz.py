"""Hostile requests against the API over plain objects; `make bench-serve` fires 10,000 at a real Serve."""

from __future__ import annotations

from typing import Any

import requests

from jobs.benchmarks.serve_fuzz import barrage


def test_no_hostile_request_is_a_fault_of_the_server(client: Any) -> None:
    def send(method: str, path: str, **how: Any) -> Any:
        ready = requests.Request(method, "http://127.0.0.1" + path, **how).prepare()
        return client.request(method, ready.path_url, content=ready.body, headers=dict(ready.headers))

    found = barrage(send, client.get("/openapi.json").json(), 600)
    assert found["faults"] == []
    # The barrage reaches what it means to: refusals of each kind, and requests that are answered.
    assert {"200", "404", "405", "415", "422"} <= set(found["statuses"])
    assert client.post("/v1/search", json={"title": "red mug", "k": 3, "attributes_source": "none"}).status_code == 200


def test_the_barrage_sees_a_fault(client: Any) -> None:
    class Broken:
        status_code = 500
        text = "Traceback"

    found = barrage(lambda *_, **__: Broken(), client.get("/openapi.json").json(), 50)
    assert found["fault_count"] >= 50

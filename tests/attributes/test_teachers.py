"""Teachers, with a local server as the endpoint."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from afmrl_ray.attributes.teachers import ColumnTeacher, OpenAITeacher, TeacherItem, make_teacher
from afmrl_ray.attributes.text import Attributes, InvalidAttributes
from afmrl_ray.config.teacher import ColumnTeacherConfig, OpenAITeacherConfig
from afmrl_ray.errors import ConfigError, TeacherError

PNG = b"\x89PNG\r\n\x1a\n" + b"pixels"
Reply = tuple[int, dict[str, str], str]


class FakeEndpoint:
    """Chat completions on a free port; `reply` answers each request, and `requests` records them."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.reply: Callable[[int, str], Reply] = lambda count, title: completion(f"name: {title}")
        lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    endpoint.requests.append(body)
                    endpoint.headers.append({"path": self.path, **dict(self.headers)})
                    count = len(endpoint.requests)
                title = body["messages"][0]["content"][-1]["text"].partition("Title: ")[2]
                status, headers, text = endpoint.reply(count, title)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base_url = f"http://127.0.0.1:{self.server.server_port}/v1"


def completion(text: str | None, finish_reason: str = "stop") -> Reply:
    choice = {"message": {"content": text}, "finish_reason": finish_reason}
    return 200, {}, json.dumps({"choices": [choice]})


@pytest.fixture
def endpoint() -> Iterator[FakeEndpoint]:
    fake = FakeEndpoint()
    thread = threading.Thread(target=fake.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()
    thread.join()


def _teacher(endpoint: FakeEndpoint, cache: Path, **settings: Any) -> OpenAITeacher:
    settings = {"model": "m", "backoff_s": 0.01, "max_retries": 2, "concurrency": 2, **settings}
    config = OpenAITeacherConfig(base_url=endpoint.base_url, **settings)
    return OpenAITeacher(config, max_attributes=3, cache_dir=str(cache))


def _item(title: str, image: bytes = PNG) -> TeacherItem:
    return TeacherItem(title, title, {}, lambda: image)


def test_the_column_teacher_normalises_and_validates() -> None:
    teacher = make_teacher(ColumnTeacherConfig(), max_attributes=2, cache_dir="unused")
    assert isinstance(teacher, ColumnTeacher)
    sources: list[dict[str, str | None]] = [{"Color": "Red", "x": None}, {}, {"a": "1", "b": "2", "c": "3"}]
    found = teacher.annotate([TeacherItem("i", "", source, bytes) for source in sources])
    assert found == [(("color", "red"),), InvalidAttributes("empty"), InvalidAttributes("too_many")]


def test_requests_contain_image_title_and_key(
    endpoint: FakeEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "secret-key")
    teacher = _teacher(endpoint, tmp_path / "cache", api_key_env="TEACHER_KEY", max_tokens=77)
    assert teacher.annotate([_item("Blue {shoe}"), _item("no image", b"")]) == [
        (("name", "blue {shoe}"),),
        (("name", "no image"),),
    ]
    bodies = {body["messages"][0]["content"][-1]["text"]: body for body in endpoint.requests}
    with_image = next(body for text, body in bodies.items() if text.endswith("Title: Blue {shoe}"))
    url = with_image["messages"][0]["content"][0]["image_url"]["url"]
    assert url == f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    assert (with_image["model"], with_image["max_tokens"], with_image["temperature"]) == ("m", 77, 0)
    without = next(body for text, body in bodies.items() if text.endswith("no image"))
    assert [part["type"] for part in without["messages"][0]["content"]] == ["text"]
    assert endpoint.headers[0]["path"] == "/v1/chat/completions"
    assert endpoint.headers[0]["Authorization"] == "Bearer secret-key"
    assert all("secret-key" not in path.read_text() for path in (tmp_path / "cache").iterdir())


def test_a_missing_key_is_an_error_before_any_request(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ABSENT_TEACHER_KEY"):
        _teacher(endpoint, tmp_path, api_key_env="ABSENT_TEACHER_KEY")


@pytest.mark.parametrize("status", [429, 503])
def test_a_retry_waits_as_long_as_retry_after_says(
    endpoint: FakeEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("afmrl_ray.attributes.teachers.time.sleep", waits.append)
    endpoint.reply = lambda count, title: (status, {"Retry-After": "7"}, "") if count == 1 else completion("a: b")
    assert _teacher(endpoint, tmp_path).annotate([_item("t")]) == [(("a", "b"),)]
    assert waits == [7.0]


def test_waits_between_retries_grow(endpoint: FakeEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("afmrl_ray.attributes.teachers.time.sleep", waits.append)
    endpoint.reply = lambda count, title: (500, {}, "boom") if count < 5 else completion("a: b")
    _teacher(endpoint, tmp_path, max_retries=4, backoff_s=1.0).annotate([_item("t")])
    assert len(waits) == 4
    assert all(2**i / 2 <= wait <= 2**i for i, wait in enumerate(waits))


def test_the_error_after_all_retries_names_the_endpoint(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    endpoint.reply = lambda count, title: (500, {}, "boom")
    with pytest.raises(TeacherError, match=rf"{endpoint.base_url}/chat/completions: no answer after 3 tries .*boom"):
        _teacher(endpoint, tmp_path).annotate([_item("t")])
    assert len(endpoint.requests) == 3
    assert not any(tmp_path.iterdir())


def test_a_rejected_key_is_not_retried(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    endpoint.reply = lambda count, title: (401, {}, "bad key")
    with pytest.raises(TeacherError, match="status 401: bad key"):
        _teacher(endpoint, tmp_path, concurrency=1).annotate([_item("t")])
    assert len(endpoint.requests) == 1


def test_the_error_names_an_unreachable_endpoint(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    teacher = OpenAITeacher(
        OpenAITeacherConfig(base_url="http://127.0.0.1:9/v1", model="m", max_retries=0),
        max_attributes=3,
        cache_dir=str(tmp_path),
    )
    with pytest.raises(TeacherError, match=r"127\.0\.0\.1:9/v1/chat/completions: no answer .*ConnectionError"):
        teacher.annotate([_item("t")])


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (completion("I see a red shoe."), "no_pair"),
        (completion(None), "empty"),
        (completion("color: red", "length"), "unfinished"),
        (completion("a: 1; b: 2; c: 3; d: 4"), "too_many"),
    ],
)
def test_malformed_answers_are_invalid_and_cached(
    endpoint: FakeEndpoint, tmp_path: Path, reply: Reply, reason: str
) -> None:
    endpoint.reply = lambda count, title: reply
    for _ in range(2):
        assert _teacher(endpoint, tmp_path).annotate([_item("t")]) == [InvalidAttributes(reason)]  # type: ignore[arg-type]
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize("body", ["<html>", "{}", '{"choices": []}', "[1]", '{"choices": [{"message": null}]}'])
def test_an_answer_that_is_not_a_chat_completion_is_an_error(endpoint: FakeEndpoint, tmp_path: Path, body: str) -> None:
    endpoint.reply = lambda count, title: (200, {}, body)
    with pytest.raises(TeacherError, match="not a chat completion"):
        _teacher(endpoint, tmp_path).annotate([_item("t")])


def test_an_interrupted_run_repeats_no_request(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    items = [_item(f"t{i}") for i in range(10)]
    endpoint.reply = lambda count, title: completion(f"name: {title}") if count <= 5 else (401, {}, "")
    with pytest.raises(TeacherError):
        _teacher(endpoint, tmp_path, concurrency=1).annotate(items)
    answered = 5
    endpoint.requests.clear()
    endpoint.reply = lambda count, title: completion(f"name: {title}")
    found = _teacher(endpoint, tmp_path).annotate(items)
    assert found == [(("name", f"t{i}"),) for i in range(10)]
    assert len(endpoint.requests) == 10 - answered


def test_equal_items_share_a_request_and_another_prompt_model_or_image_does_not(
    endpoint: FakeEndpoint, tmp_path: Path
) -> None:
    same = [_item("t") for _ in range(8)]
    assert len(set(_teacher(endpoint, tmp_path, concurrency=8).annotate(same))) == 1
    assert len(endpoint.requests) == 1
    _teacher(endpoint, tmp_path, prompt="Other. Title: {title}").annotate(same)
    _teacher(endpoint, tmp_path, model="n").annotate(same)
    _teacher(endpoint, tmp_path).annotate([_item("t", PNG + b"other")])
    assert len(endpoint.requests) == 4


def test_another_server_needs_a_new_request_and_another_password_does_not(
    endpoint: FakeEndpoint, tmp_path: Path
) -> None:
    def annotate(base_url: str) -> Attributes | InvalidAttributes:
        config = OpenAITeacherConfig(base_url=base_url, model="m", max_retries=0)
        (found,) = OpenAITeacher(config, max_attributes=3, cache_dir=str(tmp_path)).annotate([_item("t")])
        return found

    endpoint.reply = lambda count, title: completion(f"served: {endpoint.headers[-1]['path']}")
    place = endpoint.base_url.removeprefix("http://")
    wrong = annotate(f"http://user:old@{place}/wrong")
    right = annotate(f"http://user:old@{place}")
    assert wrong != right
    assert annotate(f"http://user:new@{place}/") == right
    assert len(endpoint.requests) == 2


def test_the_column_teacher_selects_attributes_by_name_in_order():
    item = TeacherItem("a", "t", {"Size": "XL", "color": "Red", "note": "x"}, lambda: b"")
    assert ColumnTeacher(4, names=("color", "Size", "weight")).annotate([item]) == [(("color", "red"), ("size", "xl"))]

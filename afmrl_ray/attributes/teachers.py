"""Teachers, the sources of distillation labels: the catalogue's own column, or a model behind an HTTP endpoint."""

from __future__ import annotations

import base64
import hashlib
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Protocol

import requests

from afmrl_ray import storage
from afmrl_ray.attributes.text import (
    Attributes,
    InvalidAttributes,
    format_attributes,
    normalise_attributes,
    parse_attributes,
    select_attributes,
)
from afmrl_ray.config.teacher import ColumnTeacherConfig, OpenAITeacherConfig
from afmrl_ray.errors import ConfigError, TeacherError
from afmrl_ray.redact import without_credentials

_LONGEST_BACKOFF_S = 60.0
_SIGNATURES = (
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"\x89PNG", "image/png"),
    (b"GIF8", "image/gif"),
    (b"RIFF", "image/webp"),
)


@dataclass(frozen=True)
class TeacherItem:
    """One item as a teacher sees it.

    Attributes:
        item_id: id of the item.
        title: seller's text; may be empty.
        attributes: of the catalogue.
        image_bytes: returns the encoded image, empty if there is none; called only when the image is needed.
    """

    item_id: str
    title: str
    attributes: Mapping[str, str | None]
    image_bytes: Callable[[], bytes]


class Teacher(Protocol):
    """A source of attributes for items."""

    def annotate(self, items: Sequence[TeacherItem]) -> list[Attributes | InvalidAttributes]:
        """Attributes of each item, in order."""
        ...


def make_teacher(
    config: ColumnTeacherConfig | OpenAITeacherConfig, *, cache_dir: str, max_attributes: int = sys.maxsize
) -> Teacher:
    """The teacher of a config, but for kind `model`, which `models.annotate` serves.

    Args:
        config: `teacher` section.
        cache_dir: path or URI of the folder that caches the answers of an endpoint.
        max_attributes: maximum number of pairs; an item with more is invalid.
    """
    if isinstance(config, ColumnTeacherConfig):
        return ColumnTeacher(max_attributes, names=config.names)
    return OpenAITeacher(config, max_attributes=max_attributes, cache_dir=cache_dir)


class ColumnTeacher:
    """The catalogue's own attributes, in normal form.

    Args:
        max_attributes: maximum number of pairs; an item with more is invalid.
        names: names of the attributes that are used, in this order; none = all, in the item's order.
    """

    def __init__(self, max_attributes: int, *, names: Sequence[str] | None = None) -> None:
        self._max_attributes = max_attributes
        self._names = names

    def annotate(self, items: Sequence[TeacherItem]) -> list[Attributes | InvalidAttributes]:
        texts = [
            format_attributes(normalise_attributes(select_attributes(item.attributes, self._names))) for item in items
        ]
        return [parse_attributes(text, max_attributes=self._max_attributes) for text in texts]


class OpenAITeacher:
    """A model behind an endpoint with OpenAI's chat completions API.

    Every answer is cached at once, under the digest of its request, so that a run that was interrupted repeats no
    request.

    Args:
        config: endpoint, model, prompt and limits.
        max_attributes: maximum number of pairs; an item with more is invalid.
        cache_dir: path or URI of the folder of answers.

    Raises:
        ConfigError: the environment variable of the key is not set.
    """

    def __init__(self, config: OpenAITeacherConfig, *, max_attributes: int, cache_dir: str) -> None:
        self._config = config
        self._max_attributes = max_attributes
        self._cache_dir = cache_dir
        self._url = f"{config.base_url.rstrip('/')}/chat/completions"
        self._session = requests.Session()
        self._session.mount(self._url, requests.adapters.HTTPAdapter(pool_maxsize=config.concurrency))
        self._session.auth = _Bearer(_api_key(config.api_key_env))
        self._lock = threading.Lock()
        self._request_locks: dict[str, threading.Lock] = {}

    def annotate(self, items: Sequence[TeacherItem]) -> list[Attributes | InvalidAttributes]:
        """Attributes of each item, in order; requests are sent only for items without a cached answer.

        Raises:
            TeacherError: a request failed after all retries; the answers so far are cached.
        """
        with ThreadPoolExecutor(max_workers=self._config.concurrency) as pool:
            try:
                return list(pool.map(self._annotate, items))
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _annotate(self, item: TeacherItem) -> Attributes | InvalidAttributes:
        image = item.image_bytes()
        prompt = self._config.prompt.replace("{title}", item.title)
        path = storage.join(self._cache_dir, f"{self._key(image, item.title)}.json")
        with self._lock:
            lock = self._request_locks.setdefault(path, threading.Lock())
        with lock:
            if storage.exists(path):
                answer = storage.read_json(path)
            else:
                answer = self._request(image, prompt)
                storage.write_json(path, answer)
        return parse_attributes(answer["text"], max_attributes=self._max_attributes, complete=answer["complete"])

    def _key(self, image: bytes, title: str) -> str:
        config = self._config
        # Two servers may use one name for different models.
        server = without_credentials(config.base_url.rstrip("/"))
        return storage.digest(
            [hashlib.sha256(image).hexdigest(), title, server, config.model, config.prompt, config.max_tokens]
        )

    def _request(self, image: bytes, prompt: str) -> dict[str, Any]:
        content: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
        if image:
            content.insert(0, {"type": "image_url", "image_url": {"url": _data_url(image)}})
        response = self._post(
            {
                "model": self._config.model,
                "messages": [{"role": "user", "content": content}],
                "max_tokens": self._config.max_tokens,
                "temperature": 0,
            }
        )
        try:
            choice = response.json()["choices"][0]
            text = choice["message"]["content"] or ""
            return {"text": str(text), "complete": choice.get("finish_reason") != "length"}
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise TeacherError(
                f"{self._url}: the answer is not a chat completion ({_excerpt(response)}); check teacher.base_url"
            ) from error

    def _post(self, body: dict[str, Any]) -> requests.Response:
        for attempt in range(self._config.max_retries + 1):
            wait = self._backoff(attempt)
            try:
                response = self._session.post(self._url, json=body, timeout=self._config.timeout_s)
            except (requests.Timeout, requests.ConnectionError) as error:
                problem = type(error).__name__
            except requests.RequestException as error:
                raise TeacherError(f"{self._url}: invalid request ({error}); check teacher.base_url") from error
            else:
                if response.ok:
                    return response
                problem = f"status {response.status_code}: {_excerpt(response)}"
                if response.status_code not in (408, 429) and response.status_code < 500:
                    raise TeacherError(
                        f"{self._url}: {problem}; check teacher.base_url, teacher.model and the key in "
                        f"{self._config.api_key_env or 'teacher.api_key_env'}"
                    )
                wait = max(wait, _retry_after(response))
            if attempt < self._config.max_retries:
                time.sleep(wait)
        raise TeacherError(
            f"{self._url}: no answer after {self._config.max_retries + 1} tries ({problem}); "
            "run again to continue from the cached answers"
        )

    def _backoff(self, attempt: int) -> float:
        """Exponential backoff with jitter, seconds."""
        return min(self._config.backoff_s * 2**attempt, _LONGEST_BACKOFF_S) * random.uniform(0.5, 1.0)


class _Bearer(requests.auth.AuthBase):
    """Sends the key with each request; an explicit auth also keeps requests from reading ~/.netrc."""

    def __init__(self, key: str | None) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise ConfigError(f"teacher.api_key_env: the environment variable {variable} is not set; set it to the key")
    return os.environ[variable]


def _data_url(image: bytes) -> str:
    mime = next((mime for signature, mime in _SIGNATURES if image.startswith(signature)), "application/octet-stream")
    return f"data:{mime};base64,{base64.b64encode(image).decode()}"


def _retry_after(response: requests.Response) -> float:
    """Seconds of the header Retry-After, a number or a date; 0 without it."""
    value = response.headers.get("Retry-After", "")
    if value.replace(".", "", 1).isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def _excerpt(response: requests.Response) -> str:
    return " ".join(response.text.split())[:200]

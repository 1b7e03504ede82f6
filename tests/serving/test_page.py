"""The page at `/` in a real browser: upload, search, remove a chip, see the order change."""

from __future__ import annotations

import base64
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import uvicorn

from afmrl_ray.runs import RunDirectory
from afmrl_ray.serving.security import new_key
from tests.serving.conftest import Application, image_bytes

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"),
]

HOSTILE = "<img src=/nowhere onerror=\"document.title='run'\"><script>document.title='run'</script>"


class Site:
    """The application behind a real port, over plain objects."""

    def __init__(self, run: RunDirectory, folder: Path, **settings: Any) -> None:
        self.application = Application(run, folder, **settings)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        config = uvicorn.Config(self.application.api, port=port, log_level="error")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> Site:
        self._thread.start()
        while not self._server.started:
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=20)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site(served_run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Site(served_run, tmp_path_factory.mktemp("page") / "state") as site:
        yield site


class Tab:
    """An open page; `requests` are the URLs that it requested."""

    def __init__(self, browser: Any, site: Site, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.page.set_default_timeout(20_000)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(site.address + "/")

    def until(self, condition: str) -> None:
        """Wait for a JavaScript condition; Playwright's own way needs `eval`, which the page's policy forbids."""
        deadline = time.monotonic() + 20
        while not self.page.evaluate(condition):
            assert time.monotonic() < deadline, f"never: {condition}"
            time.sleep(0.05)

    def search(self, title: str, image: Path | None = None) -> list[str]:
        if image is not None:
            self.page.set_input_files("#file", str(image))
        self.page.fill("#title", title)
        self.page.click("button[type=submit]")
        return self.hits()

    def hits(self) -> list[str]:
        """Items in the order shown, once the search under way has ended and every image is there."""
        self.until("document.getElementById('status').textContent.endsWith('results')")
        self.until("[...document.querySelectorAll('#hits .image')].every((one) => one.src && one.naturalWidth > 0)")
        return [entry.get_attribute("data-item") for entry in self.page.query_selector_all("#hits li")]

    def chips(self) -> list[str]:
        return [chip.inner_text() for chip in self.page.query_selector_all("#chips button")]


@pytest.fixture
def upload(tmp_path: Path) -> Path:
    path = tmp_path / "disc.png"
    path.write_bytes(image_bytes("green"))
    return path


def test_upload_search_and_remove_a_chip(browser: Any, site: Site, upload: Path) -> None:
    tab = Tab(browser, site)
    before = tab.search("red mug", upload)
    assert len(before) == 12
    assert not tab.page.is_visible("#key-field")
    assert not tab.page.is_visible("#hint")
    assert [chip.split(":")[0] for chip in tab.chips()] == ["color", "round", "size"]
    assert "attributes" in tab.page.inner_text("#times")
    assert "ms" in tab.page.inner_text("#times")
    tab.page.click("#chips button:has-text('color')")
    tab.until("document.querySelectorAll('#chips button').length == 2")
    after = tab.hits()
    assert [chip.split(":")[0] for chip in tab.chips()] == ["round", "size"]
    assert after != before
    wanted = requests.post(
        site.address + "/v1/search",
        files={"image": upload.read_bytes()},
        data={"title": "red mug", "k": 12, "attributes_source": "given", "attributes": '{"round": "1", "size": "7"}'},
        timeout=30,
    ).json()
    assert after == [hit["item_id"] for hit in wanted["hits"]]
    scores = [float(one.inner_text()) for one in tab.page.query_selector_all("#hits .score")]
    assert scores == pytest.approx([hit["score"] for hit in wanted["hits"]], abs=1e-4)
    assert not tab.errors


def test_the_keyboard_is_enough(browser: Any, site: Site) -> None:
    tab = Tab(browser, site)
    tab.page.focus("#file")
    for _ in range(10):
        if tab.page.evaluate("document.activeElement.id") == "title":
            break
        tab.page.keyboard.press("Tab")
    tab.page.keyboard.type("red mug")
    tab.page.keyboard.press("Enter")
    tab.hits()
    for _ in range(10):
        if tab.page.evaluate("document.activeElement.closest('#chips') !== null"):
            break
        tab.page.keyboard.press("Tab")
    tab.page.keyboard.press("Enter")
    tab.until("document.querySelectorAll('#chips button').length == 2")
    tab.until("document.activeElement.getAttribute('aria-label') == 'Remove round: 1'")


@pytest.mark.parametrize(("width", "scheme"), [(400, "light"), (400, "dark"), (1280, "dark")])
def test_nothing_is_cut_off(browser: Any, site: Site, upload: Path, width: int, scheme: str) -> None:
    tab = Tab(browser, site, width=width, scheme=scheme)
    tab.search("red mug " * 30, upload)
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.page.evaluate("getComputedStyle(document.body).backgroundColor") != (
        "rgb(255, 255, 255)" if scheme == "dark" else "rgb(0, 0, 0)"
    )


def test_the_page_asks_its_own_server_only(browser: Any, site: Site, upload: Path) -> None:
    tab = Tab(browser, site)
    tab.search("red mug", upload)
    assert len(tab.requests) > 12
    assert all(address.startswith((site.address, "blob:" + site.address)) for address in tab.requests)


def test_hostile_text_is_shown_and_not_run(browser: Any, site: Site) -> None:
    item = {"item_id": "hostile", "title": HOSTILE, "category": "hostile", "attributes": {"color": "<b>x</b>"}}
    item["image"] = base64.b64encode(image_bytes()).decode()
    assert requests.post(site.address + "/v1/items", json=item, timeout=30).status_code == 200
    tab = Tab(browser, site)
    tab.page.fill("#category", "hostile")
    assert tab.search(HOSTILE) == ["hostile"]
    assert tab.page.inner_text("#hits .title") == HOSTILE
    assert tab.page.title() == "Product search"
    assert requests.delete(site.address + "/v1/items/hostile", timeout=30).status_code == 204


def test_a_missing_key_is_shown_as_an_error_and_can_be_entered(
    browser: Any, served_run: RunDirectory, tmp_path: Path
) -> None:
    key, line = new_key("shop", "user")
    (tmp_path / "keys").write_text(line + "\n")
    auth = {"keys_file": str(tmp_path / "keys")}
    with Site(served_run, tmp_path / "state", auth=auth) as site:
        tab = Tab(browser, site)
        tab.page.fill("#title", "red mug")
        tab.page.click("button[type=submit]")
        tab.page.wait_for_selector("#status.wrong")
        assert tab.page.is_visible("#key-field")
        tab.page.fill("#key", key)
        tab.page.keyboard.press("Enter")
        assert len(tab.hits()) == 12

"""Switching the round: no request mixes rounds, no upserted item is lost, and switching back works."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from afmrl_ray.serving.bundle import Bundle
from afmrl_ray.serving.errors import Problem
from afmrl_ray.serving.models import Embedding, EncoderInput
from afmrl_ray.serving.records import StoredItem
from afmrl_ray.serving.round_index import Filters
from afmrl_ray.serving.service import SearchResult, SwitchResult
from afmrl_ray.serving.uploads import Upload
from tests.serving.conftest import Application


@pytest.fixture
def at_round_0(served_run, tmp_path) -> Application:
    return Application(served_run, tmp_path / "state", number=0)


def search(application: Application, title: str = "mug", **more: Any) -> Any:
    given = {"k": 3, "filters": Filters(), "attributes_source": "generated", "given": "", **more}
    return application.service.search(Upload(title), **given)


def new_item(name: str = "new", given: str | None = None) -> StoredItem:
    return StoredItem(name, f"title of {name}", None, None, given, None, None)


def test_a_search_under_way_starts_again_when_another_round_is_served(at_round_0, bundles) -> None:
    application, reached, go = at_round_0, asyncio.Event(), asyncio.Event()
    embed = application.encoder.embed

    async def held(bundle: Bundle, given: Sequence[EncoderInput]) -> list[Embedding]:
        found = await embed(bundle, given)
        if bundle.round == 0 and given[0].upload.title == "held":
            reached.set()
            await go.wait()
        return found

    application.encoder.embed = held

    async def run() -> tuple[SearchResult, SearchResult]:
        flight = asyncio.create_task(search(application, "held"))
        await reached.wait()
        await application.service.switch(bundles[1])
        go.set()
        return await flight, await search(application, "held")

    flight, after = asyncio.run(run())
    assert flight.bundle == after.bundle == bundles[1]
    assert flight.attributes.text == after.attributes.text == "color: red; round: 1; size: 4"
    assert flight.hits == after.hits


def test_upserted_items_survive_a_switch_and_the_switch_back(at_round_0, bundles) -> None:
    application = at_round_0

    async def run() -> None:
        await application.service.upsert(new_item("a"))
        await application.service.upsert(new_item("b", given="shape: round"))
        moved = await application.service.switch(bundles[1])
        assert moved == SwitchResult(served=bundles[1].key, before=bundles[0].key, embedded=2)
        a, b = await application.service.get("a"), await application.service.get("b")
        assert (a.attributes, b.attributes) == ("color: red; round: 1; size: 10", "shape: round")
        await application.service.upsert(new_item("c"))
        assert await application.service.delete("b")
        back = await application.service.switch(bundles[0])
        assert back.embedded == 1
        for name, exists in (("a", True), ("b", False), ("c", True)):
            found = await search(application, f"title of {name}", attributes_source="generated")
            assert (found.hits[0].item_id == name) == exists
            assert found.bundle == bundles[0]
            if exists:
                assert found.hits[0].score == pytest.approx(1, abs=1e-5)
                assert found.hits[0].attributes == "color: red; round: 0; size: 10"

    asyncio.run(run())


def test_an_item_upserted_during_a_switch_is_found_afterwards(at_round_0, bundles) -> None:
    application, reached, go = at_round_0, asyncio.Event(), asyncio.Event()
    prepare = application.encoder.prepare

    async def slow(bundle: Bundle) -> None:
        reached.set()
        await go.wait()
        await prepare(bundle)

    application.encoder.prepare = slow

    async def run() -> SearchResult:
        moving = asyncio.create_task(application.service.switch(bundles[1]))
        await reached.wait()
        await application.service.upsert(new_item("during"))
        with pytest.raises(Problem, match="under way") as refused:
            await application.service.switch(bundles[1])
        assert refused.value.status == 409
        assert (await search(application, "title of during")).bundle == bundles[0]
        go.set()
        assert (await moving).embedded == 0
        return await search(application, "title of during")

    found = asyncio.run(run())
    assert found.bundle == bundles[1]
    assert found.hits[0].item_id == "during"


def test_a_switch_ends_when_another_one_replaces_it(at_round_0, bundles) -> None:
    application = at_round_0
    third = bundles[1].model_copy(update={"key": "r2-x"})
    prepare = application.encoder.prepare

    async def replaced(bundle: Bundle) -> None:
        await prepare(bundle)
        await application.index.begin_switch(third)

    application.encoder.prepare = replaced
    with pytest.raises(Problem, match="replaced by another"):
        asyncio.run(application.service.switch(bundles[1]))
    assert application.index.live.state.current == bundles[0]


def test_a_request_that_is_cancelled_does_not_break_another_that_waits_for_the_same(at_round_0) -> None:
    application, go = at_round_0, asyncio.Event()
    write = application.generator.write

    async def slow(bundle: Bundle, upload: Upload) -> tuple[str, str]:
        await go.wait()
        return await write(bundle, upload)

    application.generator.write = slow

    async def run() -> SearchResult:
        first = asyncio.create_task(search(application))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(search(application))
        await asyncio.sleep(0.05)
        first.cancel()
        go.set()
        return await second

    assert len(asyncio.run(run()).hits) == 3
    assert application.generator.calls == 1

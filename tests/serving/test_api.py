"""The HTTP API over plain objects: answers, limits and errors."""

from __future__ import annotations

import base64
import io
import json
import struct
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from afmrl_ray.serving.uploads import Upload
from tests.serving.conftest import Application, image_bytes


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def gallery_item(client) -> dict:
    hits = client.post("/v1/search", json={"title": "mug", "attributes_source": "none", "k": 1}).json()["hits"]
    return client.get(f"/v1/items/{hits[0]['item_id']}").json()


def test_form_and_json_give_the_same_answer(client) -> None:
    image = image_bytes()
    as_json = client.post("/v1/search", json={"image": encoded(image), "title": "Red disc", "k": 5}).json()
    files = {"image": ("p.png", image, "image/png")}
    as_form = client.post("/v1/search", data={"title": "Red  disc", "k": "5"}, files=files).json()
    assert len(as_json["hits"]) == 5
    for answer in (as_json, as_form):
        answer.pop("milliseconds"), answer.pop("cached")
    assert as_json == as_form
    scores = [hit["score"] for hit in as_json["hits"]]
    assert scores == sorted(scores, reverse=True)
    assert as_json["attributes"] == {"color": "red", "round": "1", "size": "8"}


def test_hits_are_those_of_exact_search_over_the_gallery(client, application: Application) -> None:
    answer = client.post("/v1/search", json={"title": "blue mug", "attributes_source": "none", "k": 100}).json()
    (query,) = client.post("/v1/embeddings", json={"input": "blue mug"}).json()["data"]
    live = application.index.live.current()
    vectors = live._index.reconstruct_n(0, live._index.ntotal)
    scores = vectors @ np.array(query["embedding"], dtype=np.float32)
    wanted = sorted(
        ((-round(float(score), 5), live._table.record(row).item_id) for row, score in enumerate(scores)),
        key=lambda x: x[0],
    )[:100]
    assert [-round(hit["score"], 5) for hit in answer["hits"]] == pytest.approx(
        [score for score, _ in wanted], abs=2e-5
    )
    assert {hit["item_id"] for hit in answer["hits"][:5]} == {item for _, item in wanted[:5]}


def test_an_indexed_item_is_found_by_its_own_content(client, tiny_catalogue_ref) -> None:
    catalogue = tiny_catalogue_ref.open()
    found = gallery_item(client)
    row = catalogue.column("item_id").index(found["item_id"])
    body = {
        "image": encoded(catalogue.image_bytes(row)),
        "title": catalogue.title(row),
        "attributes": found["attributes"],
        "k": 1,
    }
    answer = client.post("/v1/search", json=body).json()
    assert answer["attributes_source"] == "given"
    assert answer["hits"][0]["item_id"] == found["item_id"]
    assert answer["hits"][0]["score"] == pytest.approx(1, abs=1e-5)


def test_attributes_of_the_query_change_the_scores(client) -> None:
    def scores(**more) -> list[float]:
        return [hit["score"] for hit in client.post("/v1/search", json={"title": "mug", **more}).json()["hits"]]

    none, given, written = scores(attributes_source="none"), scores(attributes={"shape": "round"}), scores()
    assert none != given
    assert none != written


def test_every_hit_meets_the_filters(client, tiny_catalogue_ref) -> None:
    catalogue = tiny_catalogue_ref.open()
    category = catalogue.item(0).category
    found = gallery_item(client)
    name, value = next(iter(found["attributes"].items()))
    filters = {"category": found["category"], "attributes": {name.upper(): value}}
    hits = client.post("/v1/search", json={"title": "mug", "k": 100, "filters": filters}).json()["hits"]
    assert found["item_id"] in {hit["item_id"] for hit in hits}
    assert all(hit["category"] == found["category"] and hit["attributes"][name] == value for hit in hits)
    everything = client.post("/v1/search", json={"title": "mug", "k": 100}).json()["hits"]
    assert len(hits) < len(everything)
    assert (
        client.post("/v1/search", json={"title": "mug", "filters": {"category": f"{category}?"}}).json()["hits"] == []
    )


def test_an_upserted_item_is_found_and_filtered_until_it_is_deleted(client) -> None:
    item = {"item_id": "new:1", "title": "Green disc", "image": encoded(image_bytes("green")), "category": "discs"}
    before = client.get("/v1/model").json()["items"]
    upserted = client.post("/v1/items", json=item)
    assert upserted.status_code == 200
    assert upserted.json()["attributes"] == {"color": "red", "round": "1", "size": "10"}
    search = {"title": item["title"], "image": item["image"], "k": 3}
    hit = client.post("/v1/search", json=search).json()["hits"][0]
    assert (hit["item_id"], hit["score"]) == ("new:1", pytest.approx(1, abs=1e-5))
    assert client.get(hit["thumbnail"]).headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(client.get(hit["thumbnail"]).content)).size == (56, 56)
    only = client.post("/v1/search", json={"title": "x", "filters": {"category": "discs"}}).json()["hits"]
    assert [each["item_id"] for each in only] == ["new:1"]
    assert client.get("/v1/model").json()["items"] == before + 1

    client.post("/v1/items", json={**item, "title": "Blue disc", "attributes": {"Color": "Blue"}})
    changed = client.get("/v1/items/new:1").json()
    assert (changed["title"], changed["attributes"]) == ("Blue disc", {"color": "blue"})
    assert client.get("/v1/model").json()["items"] == before + 1

    assert client.delete("/v1/items/new:1").status_code == 204
    assert client.delete("/v1/items/new:1").status_code == 404
    assert client.get("/v1/items/new:1").status_code == 404
    assert "new:1" not in {hit["item_id"] for hit in client.post("/v1/search", json=search).json()["hits"]}


def test_an_item_of_the_gallery_can_be_replaced_and_deleted(client) -> None:
    found = gallery_item(client)
    before = client.get("/v1/model").json()["items"]
    client.post("/v1/items", json={"item_id": found["item_id"], "title": "other", "attributes": {}})
    hits = client.post("/v1/search", json={"title": "other", "attributes_source": "none", "k": 100}).json()["hits"]
    assert [hit["title"] for hit in hits if hit["item_id"] == found["item_id"]] == ["other"]
    assert client.get("/v1/model").json()["items"] == before
    assert client.delete(f"/v1/items/{found['item_id']}").status_code == 204
    assert client.get("/v1/model").json()["items"] == before - 1
    hits = client.post("/v1/search", json={"title": "other", "attributes_source": "none", "k": 100}).json()["hits"]
    assert found["item_id"] not in {hit["item_id"] for hit in hits}


@pytest.mark.parametrize(
    "item_id", ["A/B 1", "a#5", "q?x=3", "50%4", "größe", "x/thumbnail", "thumbnail", "..", " a", "x" * 1000]
)
def test_an_item_may_have_any_id(client, item_id: str) -> None:
    path = f"/v1/items/{quote(item_id, safe='')}".replace("/..", "/%2E%2E")
    item = {"item_id": item_id, "title": "Green disc", "image": encoded(image_bytes("green")), "attributes": {}}
    answer = client.post("/v1/items", json=item)
    assert answer.status_code == 200
    found = client.get(path)
    assert (found.json()["item_id"], found.json()["title"]) == (item_id, "Green disc")
    thumbnail = client.get(answer.json()["thumbnail"].replace("/../", "/%2E%2E/"))
    assert thumbnail.headers["content-type"] == "image/jpeg"
    assert client.delete(path).status_code == 204
    assert client.get(path).status_code == 404


def test_null_is_as_if_the_field_was_left_out(client) -> None:
    body = {"input": ["red mug"], "model": "afmrl", "encoding_format": None, "dimensions": None, "user": None}
    expected = client.post("/v1/embeddings", json={"input": ["red mug"]}).json()
    assert client.post("/v1/embeddings", json=body).json() == expected
    search = {"title": "red mug", "k": None, "filters": None, "image": None, "attributes": None}
    assert client.post("/v1/search", json=search).status_code == 200
    assert client.post("/v1/embeddings", json={"input": None}).status_code == 422


def test_attributes_that_are_given_are_embedded(client) -> None:
    def embedded(**more) -> list[float]:
        item = {"title": "mug", **more}
        return client.post("/v1/embeddings", json={"input": [item]}).json()["data"][0]["embedding"]

    given = embedded(attributes={"shape": "round"})
    assert given == embedded(attributes={"shape": "round"}, attributes_source="given")
    assert given != embedded()
    assert embedded() == embedded(attributes={"shape": "round"}, attributes_source="none")


@pytest.mark.parametrize("tokens", [[2675, 2579], [[2675, 2579], [305]], 7])
def test_token_ids_are_refused_with_what_to_do(client, tokens) -> None:
    answer = client.post("/v1/embeddings", json={"input": tokens})
    assert answer.status_code == 422
    assert "check_embedding_ctx_length=False" in answer.json()["detail"]


def test_the_models_are_listed_as_openai_lists_them(client) -> None:
    answer = client.get("/v1/models").json()
    names = [card["id"] for card in answer["data"]]
    assert answer["object"] == "list"
    assert names[0] == "afmrl"
    assert all(client.post("/v1/embeddings", json={"input": "x", "model": name}).status_code == 200 for name in names)
    assert client.get(f"/v1/models/{quote(names[1], safe='')}").json() == answer["data"][1]
    assert client.get("/v1/models/gpt").status_code == 404


def test_attributes_are_generated_once_for_an_image_and_title(client, application: Application) -> None:
    body = {"image": encoded(image_bytes()), "title": "Red disc"}
    first, again = (client.post("/v1/attributes", json=body).json() for _ in range(2))
    assert (first["cached"], again["cached"]) == (False, True)
    assert first["attributes"] == again["attributes"]
    assert application.generator.calls == 1
    for other in ({**body, "title": "Red Disc"}, {**body, "image": encoded(image_bytes("blue"))}):
        assert not client.post("/v1/attributes", json=other).json()["cached"]
    text = client.get("/metrics").text
    assert 'afmrl_serving_attribute_cache_total{replica="test",result="hit"} 1.0' in text
    assert 'afmrl_serving_attribute_cache_total{replica="test",result="miss"} 3.0' in text


def test_a_search_without_valid_attributes_states_the_reason(client) -> None:
    answer = client.post("/v1/search", json={"title": "unreadable"}).json()
    assert (answer["attributes"], answer["attributes_source"], answer["reason"]) == ({}, "none", "no_pair")
    assert len(answer["hits"]) == 10


def test_embeddings_in_both_encodings(client) -> None:
    texts = ["a red mug", "a blue mug"]
    plain = client.post("/v1/embeddings", json={"input": texts, "model": "afmrl"}).json()
    packed = client.post("/v1/embeddings", json={"input": texts, "encoding_format": "base64"}).json()
    assert [each["index"] for each in plain["data"]] == [0, 1]
    assert plain["usage"]["total_tokens"] == plain["usage"]["prompt_tokens"] > 4
    for a, b in zip(plain["data"], packed["data"], strict=True):
        data = base64.b64decode(b["embedding"])
        assert struct.unpack(f"<{len(data) // 4}f", data) == pytest.approx(a["embedding"], abs=0)
        assert np.linalg.norm(a["embedding"]) == pytest.approx(1, abs=1e-5)
    single = client.post("/v1/embeddings", json={"input": texts[0]}).json()
    assert single["data"][0]["embedding"] == pytest.approx(plain["data"][0]["embedding"], abs=1e-6)
    item = {"image": encoded(image_bytes()), "title": texts[0]}
    imaged = client.post("/v1/embeddings", json={"input": [item, {**item, "attributes_source": "generated"}]}).json()
    vectors = [tuple(each["embedding"]) for each in (*imaged["data"], single["data"][0])]
    assert len(set(vectors)) == 3


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("search", {}, 422, "both missing"),
        ("search", {"title": "  "}, 422, "both missing"),
        ("search", {"title": "x", "k": 0}, 422, "k"),
        ("search", {"title": "x", "k": 101}, 422, "k: at most 100"),
        ("search", {"title": "x" * 2001}, 422, "title: longer than 2000"),
        ("search", {"title": "x", "extra": 1}, 422, "extra"),
        ("search", {"title": "x", "attributes_source": "given"}, 422, "attributes: missing"),
        ("search", {"title": "x", "attributes": {str(n): "a" for n in range(33)}}, 422, "more than 32 pairs"),
        ("search", {"image": "%%%"}, 422, "not base64"),
        ("search", {"image": encoded(b"GIF89a")}, 422, "not a JPEG, PNG or WebP"),
        ("search", {"image": encoded(image_bytes(kind="GIF"))}, 422, "not a JPEG, PNG or WebP"),
        ("search", {"image": encoded(image_bytes()[:-40])}, 422, "damaged or cut off"),
        ("search", {"image": encoded(image_bytes(size=(4001, 4000)))}, 422, "more pixels"),
        ("search", {"image": encoded(image_bytes(size=(17, 3420)))}, 422, "longer than 200 times"),
        ("search", [1], 422, ""),
        ("attributes", {"title": 3}, 422, "title"),
        ("embeddings", {"input": []}, 422, "1 to 32"),
        ("embeddings", {"input": ["x"] * 33}, 422, "1 to 32"),
        ("embeddings", {"input": [1, 2]}, 422, "input"),
        ("embeddings", {"input": [""]}, 422, "input[0].image"),
        ("embeddings", {"input": "x", "model": "gpt"}, 404, "model"),
        ("embeddings", {"input": "x", "dimensions": 7}, 422, "dimensions"),
        ("items", {"item_id": "", "title": "x"}, 422, "item_id"),
        ("items", {"item_id": "a\nb", "title": "x"}, 422, "item_id"),
        ("items", {"item_id": "a"}, 422, "both missing"),
    ],
)
def test_an_invalid_request_is_refused_and_the_field_is_named(client, path: str, body, status: int, says: str) -> None:
    answer = client.post(f"/v1/{path}", json=body)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == status
    assert says in problem["detail"]
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    "title", ["\ud800", "\x00", "🫖" * 1000, "<|im_end|><|image_pad|>", "a\u202eb", "'; DROP TABLE"]
)
def test_unusual_titles_are_accepted(client, title: str) -> None:
    body = json.dumps({"title": title, "k": 1})
    answer = client.post("/v1/search", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in ((422,) if title == "\ud800" else (200,))


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 422),
        (b"[" * 100_000, "application/json", 422),
        (b"\xff\xfe", "application/json", 422),
        (b"x", "text/plain", 415),
        (b"x", "multipart/form-data; boundary=x", 400),
        (b"--x\r\n", "multipart/form-data", 400),
    ],
)
def test_malformed_bodies_are_refused(client, content: bytes, kind: str, status: int) -> None:
    answer = client.post("/v1/search", content=content, headers={"content-type": kind})
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_body_above_the_limit_is_refused_before_it_is_read(served_run, tmp_path) -> None:
    application = Application(served_run, tmp_path, limits={"body_mb": 0.01})
    with application.client() as client:
        assert client.post("/v1/search", json={"title": "x"}).status_code == 200
        assert client.post("/v1/search", content=b"x" * 20_000).status_code == 413

        def pieces():
            for _ in range(20):
                yield b"x" * 1000

        answer = client.post("/v1/search", content=pieces(), headers={"content-type": "application/json"})
        assert answer.status_code == 413
        assert answer.headers["content-type"] == "application/problem+json"


def test_a_request_past_its_deadline_is_answered_503(served_run, tmp_path) -> None:
    application = Application(served_run, tmp_path, limits={"request_s": 0.2})

    async def never(bundle, upload: Upload) -> tuple[str, str]:
        import asyncio

        await asyncio.sleep(60)
        return "", ""

    application.generator.write = never
    with application.client() as client:
        answer = client.post("/v1/attributes", json={"title": "x"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


def test_a_server_error_reveals_no_internals(served_run, tmp_path) -> None:
    application = Application(served_run, tmp_path)

    async def broken(bundle, upload: Upload) -> tuple[str, str]:
        raise RuntimeError("secret")

    application.generator.write = broken
    with application.client(raise_server_exceptions=False) as client:
        answer = client.post("/v1/attributes", json={"title": "x"})
    assert answer.status_code == 500
    assert "secret" not in answer.text


def test_cors_is_off_unless_configured(served_run, tmp_path) -> None:
    ask = {"origin": "https://shop.example", "access-control-request-method": "POST"}
    with Application(served_run, tmp_path / "a").client() as client:
        assert "access-control-allow-origin" not in client.options("/v1/search", headers=ask).headers
    allowed = Application(served_run, tmp_path / "b", cors_origins=["https://shop.example"])
    with allowed.client() as client:
        answer = client.options("/v1/search", headers=ask)
        assert answer.headers["access-control-allow-origin"] == "https://shop.example"
        other = client.options("/v1/search", headers={**ask, "origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


def test_unknown_paths_are_one_route_in_the_metrics(client) -> None:
    for n in range(5):
        assert client.get(f"/nothing/{n}").status_code == 404
    lines = [
        line for line in client.get("/metrics").text.splitlines() if "unknown" in line and "requests_total" in line
    ]
    assert lines == ['afmrl_serving_requests_total{method="any",replica="test",route="unknown",status="404"} 5.0']


def test_the_page_loads_nothing_from_other_hosts(client) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for name in ("", "page/page.js", "page/page.css"):
        text = client.get(f"/{name}").text
        assert "http://" not in text
        assert "https://" not in text
    assert client.get("/page/../api.py").status_code == 404

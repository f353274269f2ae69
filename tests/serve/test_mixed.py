"""Lists of texts that each name their own task: one bad item does not fail the others."""

import json
from typing import Any

import httpx
import pytest

import pastina
from tests.adapter_folder import LONG
from tests.serve.test_predict import ask, assert_like, refused

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])


def test_a_mixed_list(client: httpx.Client, tasks: pastina.Tasks) -> None:
    """Two tasks with 2 and 17 labels and a tagger in one batch; one bad item fails alone."""
    items = [
        {"task": "acme/topics", "inputs": "saw"},
        {"task": "acme/nobody", "inputs": "saw"},
        {"task": "acme/many", "inputs": LONG, "top_k": 1},
        {"task": "acme/spans", "inputs": LONG},
        {"task": "acme/topics", "inputs": " "},
        {"task": "acme/topics", "inputs": "[SEP] " * 20},
        {"task": "pairs", "inputs": {"text": "saw", "text_pair": "plum"}},
        {"task": "pairs", "inputs": "saw"},
        {"task": "acme/topics", "inputs": "x" * 4000},
    ]
    response = client.post("/v1/predict", json={"items": items})
    assert response.status_code == 200
    found = response.json()["answers"]
    assert_like(found[0], ask(client, "acme/topics", "saw")[0])
    assert found[2]["label"] == tasks.predict([("acme/many", LONG)])[0].label
    assert found[3]["kind"] == "tag"
    assert found[6]["label"] in ("same", "other")
    codes = [one.get("error", {}).get("code") for one in found]
    assert codes[1] == "unknown_task"
    assert codes[4:] == ["unreadable", "unreadable", None, "unreadable", "too_large"]
    assert "special tokens" in found[5]["error"]["message"]
    assert found[1]["error"]["near"][0].startswith("acme/")


def test_messages_of_a_mixed_list_name_the_item(client: httpx.Client) -> None:
    items = [
        {"task": "nobody", "inputs": "saw"},
        {"task": "acme/topics", "inputs": "saw"},
        {"task": "acme/topics", "inputs": ""},
        {"task": "pairs", "inputs": "saw"},
        {"task": "acme/topics", "inputs": "x" * 3001},
    ]
    found = client.post("/v1/predict", json={"items": items}).json()["answers"]
    messages = [answer.get("error", {}).get("message", "") for answer in found]
    assert messages[1] == ""
    for place, words in ((2, ": the text is empty"), (3, " is one text"), (4, " has 3,001 char")):
        assert f"items[{place}].inputs{words}" in messages[place]


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"threshold": 2}, ".threshold: Input should be less than or equal to 1."),
        (
            {"inputs": 5},
            '.inputs: this is neither a text nor a pair {"text": ..., "text_pair": ...}.',
        ),
        ({"nonsense": 1}, ".nonsense: Extra inputs are not permitted."),
        ({"task": None}, ".task: Input should be a valid string."),
        ("saw", ": Input should be an object."),
    ],
)
def test_an_item_of_another_form(client: httpx.Client, item: Any, words: str) -> None:
    """It gets an error in its place, and the others are answered."""
    good = {"task": "acme/topics", "inputs": "saw"}
    items = [good, good | item if isinstance(item, dict) else item, good]
    response = client.post("/v1/predict", json={"items": items})
    assert response.status_code == 200, response.text
    first, bad, last = response.json()["answers"]
    assert first["label"] == last["label"]
    assert bad == {"error": {"code": "invalid", "message": f"items[1]{words}"}}
    alone = client.post("/v1/predict", json={"items": items[1:2]})
    assert alone.json()["answers"][0]["error"]["code"] == "invalid"


@pytest.mark.parametrize("body", [{"items": []}, {"items": "saw"}, {"items": [1], "x": 1}, {}, []])
def test_what_is_no_list_of_items(client: httpx.Client, body: Any) -> None:
    refused(client.post("/v1/predict", json=body), 422, "invalid")


def test_many_unknown_tasks_in_one_request(client: httpx.Client) -> None:
    """Names like theirs are looked for a few times only: that takes long among thousands."""
    items = [{"task": f"acme/topic{i}", "inputs": "saw"} for i in range(200)]
    found = client.post("/v1/predict", json={"items": items}).json()["answers"]
    assert {answer["error"]["code"] for answer in found} == {"unknown_task"}
    assert [bool(answer["error"]["near"]) for answer in found] == [True] * 3 + [False] * 197


def test_half_of_a_character_is_the_fault_of_its_item_alone(client: httpx.Client) -> None:
    """JSON can say it, and no parser but Python's takes it."""
    items = [
        {"task": "acme/topics", "inputs": "saw"},
        {"task": "acme/topics", "inputs": "a saw \ud800"},
        {"task": "acme/\udcff", "inputs": "saw"},
        {"task": "acme/topics", "inputs": {"text": "\ud800", "text_pair": "saw"}},
        {"task": "acme/spans", "inputs": "the apple \U0001f34e"},
        {"task": "acme/topics", "inputs": "saw", "\ud800": 1},
    ]
    content = json.dumps({"items": items})
    response = client.post("/v1/predict", content=content)
    assert response.status_code == 200, response.text
    first, half, unknown, pair, spans, odd = response.json()["answers"]
    assert_like(first, ask(client, "acme/topics", "saw")[0])
    assert half["error"]["code"] == "unreadable"
    assert "half of a character" in half["error"]["message"]
    assert unknown["error"]["code"] == "unknown_task"
    assert pair["error"]["code"] == "unreadable"
    assert spans["kind"] == "tag"
    assert odd["error"]["code"] == "invalid"
    for wrong in (content[:-1], content.replace("1}", "NaN}"), "[" * 9000 + content):
        response = client.post("/v1/predict", content=wrong)
        assert "The body is not JSON" in refused(response, 422, "invalid")["message"]

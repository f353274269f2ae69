"""What a server answers, over HTTP, by a real process on real adapters."""

import json
import math
import socket
import threading
import time
from typing import Any

import httpx
import pytest

import pastina
from pastina.engine import native
from pastina.serve import schemas
from tests.adapter_folder import LONG
from tests.serving import Running

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])
PATH = "/v1/tasks/acme/topics/predict"
TEXTS = (LONG, "saw", "we need the apple", "please send me a drill, and a plum")


def ask(client: httpx.Client, task: str, inputs: Any, **options: Any) -> list[dict[str, Any]]:
    response = client.post(f"/v1/tasks/{task}/predict", json={"inputs": inputs, **options})
    assert response.status_code == 200, response.text
    return response.json()["answers"]


def assert_like(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The same but for rounding, which depends on what else is in a batch."""
    scores = [{s["label"]: s["score"] for s in answer["scores"]} for answer in (one, other)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    for field in ("task", "digest", "kind", "label"):
        assert one[field] == other[field]


def refused(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == code
    assert error["request_id"] == response.headers["x-request-id"]
    return error


def test_kinds(client: httpx.Client, tasks: pastina.Tasks) -> None:
    topics, many, spans = (
        ask(client, f"acme/{n}", list(TEXTS)) for n in ("topics", "many", "spans")
    )
    sets, numbers = (ask(client, f"globex/{name}", list(TEXTS)) for name in ("sets", "number"))
    for i, text in enumerate(TEXTS):
        alone = tasks.predict(
            [(name, text) for name in ("acme/topics", "acme/many", "acme/spans")]
            + [("globex/sets", text), ("globex/number", text)]
        )
        assert topics[i]["label"] == alone[0].label
        assert topics[i]["score"] == pytest.approx(alone[0].score, abs=1e-5)
        assert [s["label"] for s in topics[i]["scores"]] == sorted(
            alone[0].scores or {}, key=lambda label: -(alone[0].scores or {})[label]
        )
        assert many[i]["label"] == alone[1].label
        assert len(many[i]["scores"]) == 5
        assert spans[i]["entities"] == [
            {
                "entity_group": span.label,
                "score": pytest.approx(span.score, abs=1e-5),
                "word": text[span.start : span.end],
                "start": span.start,
                "end": span.end,
            }
            for span in alone[2].spans or ()
        ]
        assert {one["label"] for one in sets[i]["labels"]} == set(alone[3].labels or ())
        assert numbers[i]["value"] == pytest.approx(alone[4].value, abs=1e-4)
    assert any(spans[i]["entities"] for i in range(len(TEXTS)))
    for answer, name in ((topics[0], "acme/topics"), (numbers[0], "globex/number")):
        assert (answer["task"], answer["digest"]) == (name, tasks.bank[name].digest)


def test_one_text_a_list_and_pairs(client: httpx.Client, tasks: pastina.Tasks) -> None:
    (one,) = ask(client, "acme/topics", "saw")
    assert_like(one, ask(client, "acme/topics", ["plum", "saw"])[1])
    (pair,) = ask(client, "pairs", {"text": "saw", "text_pair": "plum"})
    (alone,) = tasks.predict([("pairs", ("saw", "plum"))])
    assert pair["score"] == pytest.approx(alone.score, abs=1e-5)
    url = "/v1/tasks/pairs/predict"
    error = refused(client.post(url, json={"inputs": "saw"}), 422, "unreadable")
    assert "reads pairs" in error["message"]
    assert_like(ask(client, "acme%2Ftopics", "saw")[0], one)  # a slash may be written so


def test_top_k_and_threshold(client: httpx.Client) -> None:
    (all_of_them,) = ask(client, "acme/many", "saw", top_k=None)
    assert len(all_of_them["scores"]) == 17
    assert sum(one["score"] for one in all_of_them["scores"]) == pytest.approx(1)
    (two,) = ask(client, "acme/many", "saw", top_k=2)
    assert [s["label"] for s in two["scores"]] == [s["label"] for s in all_of_them["scores"][:2]]
    (none,) = ask(client, "acme/many", "saw", threshold=0.999)
    assert (none["label"], none["scores"]) == (None, [])
    (every,) = ask(client, "globex/sets", "saw", threshold=0.0)
    assert [one["label"] for one in every["labels"]] == [one["label"] for one in every["scores"]]
    for options in ({"top_k": 0}, {"threshold": 1.5}, {"top_k": True}, {"nonsense": 1}):
        response = client.post("/v1/tasks/acme/many/predict", json={"inputs": "saw", **options})
        assert next(iter(options)) in refused(response, 422, "invalid")["message"]


def test_an_unknown_task(client: httpx.Client) -> None:
    for verb in ("post", "get"):
        path = "/v1/tasks/acme/topic" + ("/predict" if verb == "post" else "")
        response = client.request(verb, path, json={"inputs": "saw"})
        error = refused(response, 404, "unknown_task")
        assert error["near"][0] == "acme/topics"
        assert "Did you mean 'acme/topics'?" in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "[]",
        '"x"',
        "null",
        '{"inputs": 1}',
        '{"inputs": []}',
        '{"inputs": "\\ud800"}',
        "\xff",
    ],
)
def test_bodies_that_make_no_sense(client: httpx.Client, body: str) -> None:
    response = client.post("/v1/tasks/acme/topics/predict", content=body.encode("latin-1"))
    assert response.status_code == 422, response.text
    assert response.json()["error"]["code"] in ("invalid", "unreadable")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            {"inputs": 5},
            'inputs: this is neither a text nor a pair {"text": ..., "text_pair": ...}.',
        ),
        ({"inputs": ["saw", 5]}, "inputs.1: this is neither a text nor a pair"),
        ({"inputs": []}, "inputs: List should have at least 1 item"),
        ({"inputs": {"text": "saw"}}, "inputs.text_pair: Field required."),
        ({"input": "saw"}, "inputs: Field required."),
        ({"inputs": "saw", "top_k": 0}, "top_k: Input should be greater than or equal to 1."),
        ({"inputs": ""}, "inputs: the text is empty."),
        ({"inputs": ["saw", " "]}, "inputs[1]: the text is empty."),
        ({"inputs": ["saw", {"text": "a", "text_pair": "b"}]}, "and inputs[1] is a pair."),
        ({"inputs": "x" * 3001}, "inputs has 3,001 characters"),
    ],
)
def test_messages_name_the_place(client: httpx.Client, body: Any, message: str) -> None:
    response = client.post("/v1/tasks/acme/topics/predict", json=body)
    assert response.status_code in (413, 422)
    assert message in response.json()["error"]["message"]


def test_queries_that_would_be_ignored(client: httpx.Client) -> None:
    for query in ("top_k=3", "timeout=5&timeout=6", "timeuot=1"):
        for path in ("/v1/tasks/acme/topics/predict", "/v1/predict"):
            refused(client.post(f"{path}?{query}", json={"inputs": "saw"}), 422, "invalid")
    for path in ("/v1/tasks?page=2", "/v1/tasks/acme/topics?page=2", "/metrics?x=1"):
        refused(client.get(path), 422, "invalid")
    for verb in ("PUT", "DELETE"):
        refused(client.request(verb, "/v1/tasks/acme/topics?force=1"), 422, "invalid")
    response = client.post("/predict?timeout=1", json={"inputs": "saw"})
    assert (response.status_code, response.json()["error_type"]) == (422, "Validation")
    assert response.json()["error"] == "query: 'timeout' means nothing here; leave it out."
    for path in ("/healthz", "/readyz", "/", "/openapi.json"):
        assert client.get(f"{path}?time=1").status_code == 200


def test_head(client: httpx.Client, server: Running) -> None:
    """As GET, without the body."""
    paths = ("/", "/healthz", "/readyz", "/metrics", "/openapi.json", "/v1/tasks")
    for path in (*paths, "/v1/tasks/acme/topics", "/v1/tasks/acme/nobody", "/nothing", "/predict"):
        head, get = (client.request(verb, path) for verb in ("HEAD", "GET"))
        assert (head.status_code, head.content) == (get.status_code, b"")
        assert set(head.headers) == set(get.headers)
        if path != "/metrics":
            assert abs(int(head.headers["content-length"]) - len(get.content)) < 2
    allowed = {path: client.request("PATCH", path).headers["allow"] for path in (*paths[:2], PATH)}
    assert allowed == {"/": "GET, HEAD", "/healthz": "GET, HEAD", PATH: "POST"}
    assert any(line["method"] == "HEAD" for line in server.lines("request"))


def test_the_short_way_is_the_same(client: httpx.Client, server: Running) -> None:
    """Without a query a request does not go through FastAPI: nobody can tell."""
    bodies = ('{"inputs": "saw", "top_k": 1}', '{"inputs": ""}', "{", '{"inputs": 1}')
    for name in ("acme/topics", "acme/nobody", "acme%2Ftopics", "a/predict", "%00", "ü", "a" * 701):
        for body in bodies:
            path = f"/v1/tasks/{name}/predict"
            short, long = (client.post(path + q, content=body) for q in ("", "?timeout=20"))
            assert short.status_code == long.status_code
            assert set(short.headers) == set(long.headers)
            one, other = short.json(), long.json()
            for content in (one, other):
                content.get("error", {}).pop("request_id", None)
                for answer in content.get("answers", []):
                    answer["score"] = answer["scores"] = None
            assert one == other
    assert client.get("/v1/tasks/acme/topics/predict").status_code == 405
    assert client.post("/v1/tasks//predict", content="{}").status_code == 422


def test_too_much(client: httpx.Client) -> None:
    for inputs in ("x" * 3001, ["saw"] * 257):
        response = client.post("/v1/tasks/acme/topics/predict", json={"inputs": inputs})
        refused(response, 413, "too_large")
    response = client.post("/v1/tasks/acme/topics/predict", content=b" " * 3_000_000)
    refused(response, 413, "too_large")
    response = client.post("/v1/tasks/acme/topics/predict", content=b" " * 9_000_000)
    assert response.status_code == 413


def test_tei(client: httpx.Client, tasks: pastina.Tasks) -> None:
    """Route and bodies of text-embeddings-inference, for the default task."""
    one = client.post("/predict", json={"inputs": "saw"}).json()
    assert [set(pair) for pair in one] == [{"label", "score"}] * 17
    assert one[0]["label"] == tasks.predict([("acme/many", "saw")])[0].label
    batch = client.post("/predict", json={"inputs": [["saw"], ["plum"]], "truncate": True}).json()
    assert [p["label"] for p in batch[0]] == [p["label"] for p in one]
    assert len(batch) == 2
    response = client.post("/predict", json={"inputs": ["saw", "plum"]})
    assert response.status_code == 422
    assert response.json()["error_type"] == "Validation"
    long = client.post("/predict", json={"inputs": LONG * 3})
    assert (long.status_code, long.json()["error_type"]) == (413, "Validation")
    for more in ({}, {"truncation_direction": "right"}, {"truncation_direction": "Right"}):
        body = {"inputs": LONG * 3, "truncate": True, **more}
        assert client.post("/predict", json=body).status_code == 200


def test_what_else_tei_takes(client: httpx.Client) -> None:
    """What changes nothing is taken; what would be answered otherwise is refused with a sentence."""
    same = {"raw_scores": False, "truncate": False, "truncation_direction": "Left"}
    response = client.post("/predict", json={"inputs": "saw", **same})
    assert (response.status_code, len(response.json())) == (200, 17)
    response = client.post("/predict", json={"inputs": "saw", "truncation_direction": "Up"})
    assert (response.status_code, response.json()["error_type"]) == (422, "Validation")
    assert "truncation_direction: Input should be 'Left', 'Right'" in response.json()["error"]


def test_tei_leaves_out_the_side_that_is_asked_for(client: httpx.Client) -> None:
    """The start of a long text answers as that start alone, its end as that end; others are as usual."""
    start, end = "plum " * 300, "saw " * 300
    for direction, part in (("Left", end), ("left", end), ("Right", start)):
        long, alone = (
            client.post(
                "/predict",
                json={"inputs": text, "truncate": True, "truncation_direction": direction},
            ).json()
            for text in (start + end, part)
        )
        assert long == alone
    left, right = (
        client.post(
            "/predict",
            json={"inputs": start + end, "truncate": True, "truncation_direction": direction},
        ).json()
        for direction in ("Left", "Right")
    )
    assert left != right
    whole = {"inputs": start + end, "truncation_direction": "Left"}
    assert client.post("/predict", json=whole).status_code == 413


def test_raw_scores_are_those_before_softmax(client: httpx.Client) -> None:
    sure, raw = (
        client.post("/predict", json={"inputs": [["saw"], ["plum"]], "raw_scores": is_raw}).json()
        for is_raw in (False, True)
    )
    for one, other in zip(sure, raw, strict=True):
        parts = {pair["label"]: math.exp(pair["score"]) for pair in other}
        assert sum(parts.values()) != pytest.approx(1.0, abs=0.1)
        found = {label: part / sum(parts.values()) for label, part in parts.items()}
        assert found == pytest.approx({p["label"]: p["score"] for p in one}, abs=1e-5)
        assert [p["score"] for p in other] == sorted((p["score"] for p in other), reverse=True)


def test_the_list_of_tasks(client: httpx.Client, tasks: pastina.Tasks) -> None:
    found = client.get("/v1/tasks").json()
    assert found["total"] == 6
    assert [task["name"] for task in found["tasks"]] == sorted(task.name for task in tasks)
    assert "labels" not in found["tasks"][0]
    assert {task["name"]: task["digest"] for task in found["tasks"]} == {
        task.name: task.digest for task in tasks
    }
    part = client.get("/v1/tasks", params={"search": "ACME", "offset": 1, "limit": 1}).json()
    assert (part["total"], len(part["tasks"])) == (3, 1)
    tags = client.get("/v1/tasks", params={"kind": "tag"}).json()["tasks"]
    assert [task["name"] for task in tags] == ["acme/spans"]
    one = client.get("/v1/tasks/acme/topics").json()
    assert one["labels"] == ["fruit", "tool"]
    for limit in (0, 1001):
        refused(client.get("/v1/tasks", params={"limit": limit}), 422, "invalid")


def test_metrics_logs_and_ids(client: httpx.Client, server: Running) -> None:
    response = client.post(
        "/v1/tasks/acme/topics/predict",
        json={"inputs": "a secret plum"},
        headers={"X-Request-Id": "my-own.id"},
    )
    assert response.headers["x-request-id"] == "my-own.id"
    strange = client.get("/healthz", headers={"X-Request-Id": 'x"y z'})
    assert strange.headers["x-request-id"] != 'x"y z'
    (line,) = [x for x in server.lines("request") if x["request_id"] == "my-own.id"]
    assert (line["status"], line["texts"], line["method"]) == (200, 1, "POST")
    (ready,) = server.lines("ready")
    reason = native.why_not()
    assert ready["kernels"] == (f"not used: {reason}" if reason else "used")
    client.post("/v1/tasks/acme/topics/predict", json={"inputs": "a secret [SEP] [SEP] [SEP]"})
    client.post("/v1/tasks/acme/topics/predict", content=b'{"inputs": "a secret')
    assert "secret" not in server.log.read_text()
    text = client.get("/metrics").text
    for name in ("queue_seconds", "batch_rows", "batch_tokens", "batch_tasks", "engine_seconds"):
        assert f"pastina_{name}_count" in text
    assert 'pastina_task_texts_total{task="acme/topics"}' in text
    assert 'pastina_rejected_total{reason="unreadable"}' in text
    assert "pastina_tasks 6.0" in text
    assert 'route="/v1/tasks/{task}/predict",status="200"' in text


def test_routes_that_are_not_there(client: httpx.Client) -> None:
    refused(client.get("/nothing"), 404, "unknown_route")
    refused(client.post("/healthz"), 405, "wrong_method")
    refused(client.put("/v1/tasks/acme/topics", content=b"x"), 403, "forbidden")
    refused(client.delete("/v1/tasks/acme/topics"), 403, "forbidden")
    assert client.get("/docs").status_code == 404


def test_another_site_that_leads_here(server: Running) -> None:
    with server.client() as client:
        response = client.get("/v1/tasks", headers={"Host": "evil.example:80"})
        refused(response, 421, "unknown_host")


def test_deadline(client: httpx.Client) -> None:
    response = client.post(
        "/v1/tasks/acme/spans/predict", params={"timeout": 0.001}, json={"inputs": [LONG] * 256}
    )
    refused(response, 504, "deadline")
    for timeout in ("0", "nan", "x"):
        response = client.post("/v1/tasks/acme/topics/predict", params={"timeout": timeout})
        assert response.status_code == 422


def test_a_client_that_goes_away(server: Running, client: httpx.Client) -> None:
    """Its texts leave the queue."""
    body = json.dumps({"inputs": [LONG * 5] * 256}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    for _ in range(3):
        with socket.create_connection((host, int(port))) as raw:
            head = (
                b"POST /v1/tasks/acme/spans/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
            )
            raw.sendall(head + b"%d\r\n\r\n" % len(body) + body)
            time.sleep(0.15)
    started = time.monotonic()
    while True:
        gone = [x for x in server.lines("request") if x.get("refused") == "gone"]
        if gone and "pastina_waiting_texts 0.0" in client.get("/metrics").text:
            break
        assert time.monotonic() - started < 20
        time.sleep(0.05)
    assert gone[0]["status"] == 499


def test_many_at_once(server: Running, tasks: pastina.Tasks) -> None:
    """Each gets its own answer, whatever stands in the same batch."""
    names = ("acme/topics", "acme/many", "globex/number")
    truth = {(n, t): tasks.predict([(n, t)])[0] for n in names for t in TEXTS}
    wrong: list[Any] = []

    def work(number: int) -> None:
        with server.client() as client:
            for turn in range(8):
                key = (names[(number + turn) % 3], TEXTS[(number * 7 + turn) % len(TEXTS)])
                (answer,) = ask(client, *key)
                expected = truth[key]
                number_seen = answer.get("score", answer.get("value"))
                wanted = expected.score if expected.score is not None else expected.value
                if number_seen != pytest.approx(wanted, abs=1e-4):
                    wrong.append((key, answer))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_openapi_has_examples(client: httpx.Client) -> None:
    found = client.get("/openapi.json").json()
    post = found["paths"]["/v1/tasks/{task}/predict"]["post"]
    assert post["requestBody"]["content"]["application/json"]["examples"]
    assert post["responses"]["200"]["content"]["application/json"]["schema"]
    assert found["components"]["schemas"]["Answer"]["examples"]
    parts = json.dumps(found)
    for name in {part.split('"')[0] for part in parts.split("#/components/schemas/")[1:]}:
        assert name in found["components"]["schemas"]


def test_examples_of_openapi_are_what_they_show(client: httpx.Client) -> None:
    found = client.get("/openapi.json").json()
    own = ("PredictBody", "MixedBody", "TeiBody", "Answers", "MixedAnswers", "TaskInfo", "TaskList")
    for name in (*own, "Installed", "ErrorBody", "TeiError"):
        examples = found["components"]["schemas"][name]["examples"]
        assert examples
        for example in examples:
            getattr(schemas, name).model_validate(example)
    info = client.get("/v1/tasks").json()["tasks"][0]
    shown = found["components"]["schemas"]["TaskList"]["examples"][0]["tasks"][0]
    assert set(shown) <= set(info), "an example has a field that no task has"

"""Tokens and uploads over HTTP, replaced tasks, and processes that die."""

import hashlib
import json
import os
import random
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

import pastina
from pastina.files import CARD, WEIGHTS
from tests.adapter_folder import LONG, reseal
from tests.serve.test_archive import BROKEN
from tests.serving import (
    ACME,
    ADMIN,
    GLOBEX,
    SLOW,
    Running,
    files_of,
    running,
    tarred,
    wait_until,
    zipped,
)

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])
Guarded = tuple[Running, Path]
Make = Callable[..., Path]


def error(response: httpx.Response) -> tuple[int, dict[str, Any]]:
    """Status and error without what differs from request to request."""
    body = dict(response.json()["error"])
    del body["request_id"]
    return response.status_code, body


def ask(client: httpx.Client, task: str, inputs: Any = "saw") -> httpx.Response:
    return client.post(f"/v1/tasks/{task}/predict", json={"inputs": inputs})


def content(folder: Path) -> dict[str, str]:
    """Everything below a folder, with a digest."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_one_token_cannot_see_what_is_anothers(guarded: Guarded) -> None:
    server, folder = guarded
    with server.client(ACME) as acme, server.client(GLOBEX) as globex:
        assert [task["name"] for task in acme.get("/v1/tasks").json()["tasks"]] == [
            "acme/topics",
            "public",
        ]
        assert [task["name"] for task in globex.get("/v1/tasks").json()["tasks"]] == [
            "globex/topics"
        ]
        assert ask(acme, "acme/topics").status_code == 200
        archive = zipped(files_of(folder / "public"))
        with server.client(ADMIN) as admin:
            for verb, path in (
                ("POST", "/v1/tasks/globex/x/predict"),
                ("GET", "/v1/tasks/globex/x"),
            ):
                before = error(acme.request(verb, path, json={"inputs": "saw"}))
                assert admin.put("/v1/tasks/globex/x", content=archive).status_code == 201
                assert error(acme.request(verb, path, json={"inputs": "saw"})) == before
                assert before[0] == 404
                admin.delete("/v1/tasks/globex/x")
        items = [{"task": name, "inputs": "saw"} for name in ("globex/topics", "acme/topics")]
        found = acme.post("/v1/predict", json={"items": items}).json()["answers"]
        assert found[0]["error"]["code"] == "unknown_task"
        assert "globex/topics" not in str(found[0]["error"]["near"])
        assert found[1]["label"]


def test_who_is_not_known(guarded: Guarded) -> None:
    server, _ = guarded
    for token in (None, "wrong"):
        with server.client(token) as client:
            for path in ("/v1/tasks", "/v1/tasks/public", "/metrics"):
                response = client.get(path)
                assert error(response)[1]["code"] == "unauthorized"
                assert response.headers["www-authenticate"] == "Bearer"
            assert ask(client, "public").status_code == 401
            assert client.get("/healthz").status_code == 200
            assert client.get("/").status_code == 200
    with server.client(ACME) as client:
        assert error(client.get("/metrics"))[0] == 403
    with server.client(ADMIN) as client:
        assert "pastina_tasks" in client.get("/metrics").text


def test_who_may_not_change_anything(guarded: Guarded, make: Make, tmp_path: Path) -> None:
    server, folder = guarded
    before = content(folder)
    archive = zipped(files_of(make(tmp_path / "x")))
    with server.client(ACME) as client:
        for name in ("acme/topics", "acme/new", "globex/topics", "globex/new"):
            assert error(client.put(f"/v1/tasks/{name}", content=archive))[0] == 403
            assert error(client.delete(f"/v1/tasks/{name}"))[0] == 403
    assert content(folder) == before


def test_rate_limit_and_a_client_that_waits(guarded: Guarded) -> None:
    server, _ = guarded
    with server.client(SLOW) as client:
        seen = [ask(client, "public") for _ in range(6)]
    codes = [response.status_code for response in seen]
    assert codes[:4] == [200] * 4
    assert codes[-1] == 429
    assert int(seen[-1].headers["retry-after"]) in (1, 2)
    started = time.monotonic()
    with pastina.Client(server.url, SLOW) as client:
        assert client.predict("public", ["saw"])[0].label
    assert time.monotonic() - started > 0.5
    with (
        pastina.Client(server.url, SLOW, retries=0) as client,
        pytest.raises(pastina.PastinaError, match="texts a second"),
    ):
        client.predict("public", ["saw"] * 3)


def test_upload_replace_remove(guarded: Guarded, make: Make, tmp_path: Path) -> None:
    server, folder = guarded
    one, other = (make(tmp_path / f"{seed}", seed=seed) for seed in (31, 32))
    digests = [json.loads((path / CARD).read_text())["digest"] for path in (one, other)]
    with server.client(ADMIN) as client:
        name = "new/straße"
        first = client.put(f"/v1/tasks/{name}", content=zipped(files_of(one)))
        assert (first.status_code, first.json()) == (
            201,
            {"task": name, "digest": digests[0], "replaced": False},
        )
        assert ask(client, name).json()["answers"][0]["digest"] == digests[0]
        second = client.put(f"/v1/tasks/{name}", content=tarred(files_of(other)))
        assert (second.status_code, second.json()["replaced"]) == (200, True)
        assert ask(client, name).json()["answers"][0]["digest"] == digests[1]
        assert files_of(folder / name) == files_of(other)
        assert client.delete(f"/v1/tasks/{name}").status_code == 204
        assert ask(client, name).status_code == 404
        assert client.delete(f"/v1/tasks/{name}").status_code == 404
        assert not (folder / name).exists()
        assert not list(folder.glob(".*"))


def test_names_that_lead_elsewhere(guarded: Guarded, make: Make, tmp_path: Path) -> None:
    server, folder = guarded
    before, around = content(folder), content(folder.parent)
    archive = zipped(files_of(make(tmp_path / "x")))
    names = ("%2e%2e/x", "x/%2e%2e/%2e%2e/y", "%2Fx", "x%00", ".x", "a%5Cb", "a//b", "x/adapter")
    with server.client(ADMIN) as client:
        for name in names:
            response = client.put(f"/v1/tasks/{name}", content=archive)
            assert response.status_code in (404, 422), (name, response.text)
    around = {k: v for k, v in around.items() if "log" not in k}
    assert {k: v for k, v in content(folder.parent).items() if "log" not in k} == around
    assert content(folder) == before


def poisoned(folder: Path, files: dict[str, bytes], change: Callable[[Any], Any]) -> bytes:
    """The adapter with other tensors, and the digest that belongs to them."""
    from safetensors.torch import load, save

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, own in files.items():
        (folder / name).write_bytes(own)
    tensors = {key: change(tensor) for key, tensor in load(files[WEIGHTS]).items()}
    (folder / WEIGHTS).write_bytes(save(tensors))
    return zipped(files_of(reseal(folder)))


def test_uploads_that_are_refused(guarded: Guarded, make: Make, tmp_path: Path) -> None:
    """Nothing of them is written, and the task that was there goes on answering."""
    import torch

    server, folder = guarded
    files = files_of(make(tmp_path / "x"))
    other = files_of(make(tmp_path / "y", labels=("a", "b", "c")))
    changes: dict[str, Callable[[Any], Any]] = {
        "nan": lambda tensor: tensor * float("nan"),
        "infinity": lambda tensor: tensor + float("inf"),
        "whole numbers": lambda tensor: tensor.to(torch.int32),
        "bytes": lambda tensor: tensor.to(torch.uint8),
        "complex": lambda tensor: tensor.to(torch.complex64),
        "other shape": lambda tensor: tensor[:1],
        "large": lambda tensor: tensor.repeat(*[400, *[1] * (tensor.dim() - 1)]),
    }
    archives = {name: poisoned(tmp_path / "z", files, change) for name, change in changes.items()}
    archives |= {sort: write(files) for sort, (write, _) in BROKEN.items() if sort != "large card"}
    archives["card of another"] = zipped(files | {CARD: other[CARD]})
    archives["card is a list"] = zipped(files | {CARD: b"[" * 100_000})
    archives["card with NaN"] = zipped(files | {CARD: files[CARD].replace(b"24", b"NaN")})
    archives["config is null"] = zipped(files | {"adapter_config.json": b"null"})
    with server.client(ADMIN) as client:
        before = content(folder)
        for name, archive in archives.items():
            for task in ("public", "brand/new"):
                response = client.put(f"/v1/tasks/{task}", content=archive)
                assert response.status_code in (413, 422), (name, response.text)
        assert content(folder) == before
        assert not list(folder.glob(".*"))
        assert ask(client, "public").status_code == 200
        assert client.get("/v1/tasks").json()["total"] == 3


def test_a_large_or_slow_upload(guarded: Guarded) -> None:
    server, folder = guarded
    before = content(folder)
    with server.client(ADMIN) as client:
        for size in (400_001, 5_000_000):
            try:
                response = client.put("/v1/tasks/public", content=b"\0" * size)
            except (httpx.WriteError, httpx.ReadError):
                continue  # the server had hung up before all was sent
            assert error(response)[1]["code"] == "too_large"
    host, port = server.url.removeprefix("http://").split(":")
    head = f"PUT /v1/tasks/public HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ADMIN}\r\n"
    with socket.create_connection((host, int(port)), 30) as slow:
        slow.sendall(f"{head}Content-Length: 5000\r\n\r\nPK".encode())
        assert slow.recv(4000).startswith(b"HTTP/1.1 408")
    with socket.create_connection((host, int(port)), 30) as nothing, server.client(ADMIN) as client:
        nothing.sendall(b"PUT /v1/tas")  # and never anything more
        assert ask(client, "public").status_code == 200
    assert content(folder) == before


def test_two_uploads_at_once(guarded: Guarded, make: Make, tmp_path: Path) -> None:
    """One of them wins, whole; whoever had to wait may come again."""
    server, folder = guarded
    files = [files_of(make(tmp_path / f"{seed}", seed=seed)) for seed in (41, 42, 43, 44)]
    codes: list[int] = []

    def put(own: dict[str, bytes]) -> None:
        with pastina.Client(server.url, ADMIN) as client:
            codes.append(len(client.put("both", zipped(own))))

    threads = [threading.Thread(target=put, args=(own,)) for own in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [3] * 4
    assert files_of(folder / "both") in files
    with server.client(ADMIN) as client:
        digest = json.loads((folder / "both" / CARD).read_text())["digest"]
        assert ask(client, "both").json()["answers"][0]["digest"] == digest
        client.delete("/v1/tasks/both")


def test_replaced_while_it_answers(
    guarded: Guarded, make: Make, bert: Path, tmp_path: Path
) -> None:
    """Each answer is wholly of one version, and says of which, with 100 requests in flight."""
    server, _ = guarded
    num_in_flight = 100
    sets = (("a", "b"), ("c", "d", "e"))
    folders = [make(tmp_path / f"{i}", labels=sets[i], seed=51 + i) for i in range(2)]
    archives = [zipped(files_of(path)) for path in folders]
    truth = {}
    for path in folders:
        tasks = pastina.Tasks(str(bert), precision="fp32")
        task = tasks.add(path, "x")
        truth[task.digest] = tasks.predict([("x", LONG)])[0].scores or {}
    wrong: list[Any] = []
    seen: set[str] = set()
    stop = threading.Event()

    def work(client: httpx.Client) -> None:
        while not stop.is_set():
            response = ask(client, "changing", [LONG] * 3)
            answers = response.json().get("answers", [])
            if response.status_code != 200 or len({a["digest"] for a in answers}) != 1:
                wrong.append(response.text)
            for answer in answers:
                scores = {one["label"]: one["score"] for one in answer["scores"]}
                if scores != pytest.approx(truth[answer["digest"]], abs=1e-4):
                    wrong.append(answer)
                seen.add(answer["digest"])

    many = httpx.Limits(max_connections=num_in_flight, max_keepalive_connections=num_in_flight)
    with server.client(ADMIN) as client, server.client(ADMIN, limits=many) as asking:
        client.put("/v1/tasks/changing", content=archives[0])
        threads = [threading.Thread(target=work, args=(asking,)) for _ in range(num_in_flight)]
        for thread in threads:
            thread.start()
        for turn in range(12):
            assert client.put("/v1/tasks/changing", content=archives[1 - turn % 2]).is_success
            time.sleep(0.05)
        stop.set()
        for thread in threads:
            thread.join()
        client.delete("/v1/tasks/changing")
    assert not wrong, wrong[:2]
    assert seen == set(truth)


def test_changes_of_the_folder_are_seen(guarded: Guarded, make: Make, tmp_path: Path) -> None:
    """Within a poll interval, broken ones with their reason, in the list, the log and a metric."""
    server, folder = guarded
    with server.client(ADMIN) as client:

        def names(**query: Any) -> list[str]:
            return [t["name"] for t in client.get("/v1/tasks", params=query).json()["tasks"]]

        make(folder / "later" / "x")
        wait_until(lambda: "later/x" in names(), 10)
        shutil.copytree(folder / "later" / "x", folder / "later" / "broken")
        with (folder / "later" / "broken" / WEIGHTS).open("ab") as file:
            file.write(b"more")
        wait_until(lambda: names(refused=True) == ["later/broken"], 10)
        broken = client.get("/v1/tasks/later/broken").json()
        assert "was changed after it was written" in broken["refused"]
        status, body = error(ask(client, "later/broken"))
        assert (status, body["code"]) == (404, "unknown_task")
        assert "pastina_tasks_refused 1.0" in client.get("/metrics").text
        (line,) = [x for x in server.lines("adapter refused") if x["task"] == "later/broken"]
        assert line["reason"] == broken["refused"]
        shutil.rmtree(folder / "later")
        wait_until(lambda: "later/x" not in names(), 10)
        assert names(refused=True) == []


def test_an_engine_that_is_killed(guarded: Guarded, make: Make, tmp_path: Path) -> None:
    """kill -9 during uploads: it is started again, and the folder is as good as before."""
    server, _ = guarded
    archive = zipped(files_of(make(tmp_path / "x")))
    draw = random.Random(3)
    with server.client(ADMIN) as client:
        before = {t["name"]: t["digest"] for t in client.get("/v1/tasks").json()["tasks"]}
        stop = threading.Event()
        codes: set[int] = set()

        def work(number: int) -> None:
            with server.client(ADMIN) as own:
                while not stop.is_set():
                    codes.add(own.put(f"/v1/tasks/up/{number}", content=archive).status_code)
                    codes.add(ask(own, "public").status_code)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.2 + draw.random() / 5)
        os.kill(server.engine(), signal.SIGKILL)
        wait_until(lambda: client.get("/readyz").status_code == 503, 10)
        assert client.get("/healthz").status_code == 200
        wait_until(lambda: client.get("/readyz").status_code == 200)
        stop.set()
        for thread in threads:
            thread.join()
        assert codes <= {200, 201, 429, 503}
        found = {t["name"]: t["digest"] for t in client.get("/v1/tasks").json()["tasks"]}
        assert all(found.get(name) == digest for name, digest in before.items())
        assert client.get("/v1/tasks", params={"refused": True}).json()["total"] == 0
        for number in range(3):
            client.delete(f"/v1/tasks/up/{number}")


def test_replicas_restart_and_a_full_queue(guarded: Guarded, make: Make, tmp_path: Path) -> None:
    """Another server on the same folder, by fsspec: the same tasks and digests; little room."""
    first, folder = guarded
    limits = ("--set", "queue_texts=8", "--set", "poll_s=0.2", "--set", "max_tokens=32")
    with running(f"file://{folder}", tmp_path / "log", *limits, "--precision", "fp32") as second:
        with first.client(ADMIN) as one, second.client() as other:

            def listed(client: httpx.Client) -> dict[str, str]:
                return {t["name"]: t["digest"] for t in client.get("/v1/tasks").json()["tasks"]}

            assert listed(one) == listed(other)
            archive = zipped(files_of(make(tmp_path / "x")))
            one.put("/v1/tasks/acme/fresh", content=archive)
            wait_until(lambda: listed(one) == listed(other), 10)
            one.delete("/v1/tasks/acme/fresh")
            wait_until(lambda: listed(one) == listed(other), 10)
            assert ask(other, "public", ["saw"] * 20).status_code == 200, "alone it may be larger"
            assert other.put("/v1/tasks/x", content=archive).status_code == 403
            check_full_queue(second)
        os.kill(second.process.pid, signal.SIGINT)
        assert second.process.wait(30) == 0
        events = [line["event"] for line in second.lines()]
        assert "no tokens: this machine only" in events


def check_full_queue(server: Running) -> None:
    """Some are refused with 429 and a time to wait, and a client that waits is answered."""
    seen: list[httpx.Response] = []
    kept: list[bool] = []

    def work() -> None:
        with server.client() as client:
            for _ in range(6):
                seen.append(ask(client, "public", [LONG] * 6))

    def patient() -> None:
        with pastina.Client(server.url, retries=50) as client:
            kept.append(len(client.predict("public", [LONG] * 6)) == 6)

    threads = [threading.Thread(target=work) for _ in range(6)]
    threads += [threading.Thread(target=patient) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    codes = {response.status_code for response in seen}
    assert codes == {200, 429}
    full = next(response for response in seen if response.status_code == 429)
    assert error(full)[1]["code"] == "queue_full"
    assert int(full.headers["retry-after"]) >= 1
    assert kept == [True, True]


def test_starts_that_fail(folder: Path, tmp_path: Path) -> None:
    from tests.processes import pastina as run

    work = tmp_path / "work"
    work.mkdir()
    for options, words in (
        (("nowhere",), "There is no folder nowhere"),
        ((str(folder / "acme" / "topics"),), "is an adapter. Name the folder in which it lies"),
        ((str(folder), "--host", "0.0.0.0"), "open to others"),
        ((str(folder), "--tokens", "nowhere"), "no file of tokens nowhere"),
        ((str(folder), "--set", "x=1"), "no setting 'x'"),
        ((str(folder), "--backbone", str(tmp_path)), "config.json"),
    ):
        done = run("serve", *options, "--port", "0", folder=work)
        last = done.err.strip().splitlines()[-1]
        assert (done.code, last.startswith("pastina: ")) == (1, True), done.err
        assert words in last
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("serve", str(folder), "--port", str(taken.getsockname()[1]), folder=work)
        assert "cannot be used" in done.err
    shown = run("serve", str(folder), "--show", folder=work)
    assert json.loads(shown.out)["max_tokens"] == 1024
    assert shown.err == ""


def test_a_forbidden_task_is_like_one_that_is_not_there_beside_others(guarded: Guarded) -> None:
    """Names like an unknown one are looked for a few times; which tasks count tells nothing."""
    server, _ = guarded
    with server.client(ACME) as client:
        found = []
        for name in ("nosuch/topics", "globex/topics"):
            items = [{"task": name, "inputs": "x"}] * 3 + [{"task": "acme/topic", "inputs": "x"}]
            found.append(client.post("/v1/predict", json={"items": items}).json()["answers"][-1])
        assert found[0] == found[1]
        assert found[0]["error"]["near"] == []


def test_a_metric_that_is_no_number(guarded: Guarded, make: Make, tmp_path: Path) -> None:
    server, folder = guarded
    files = files_of(reseal(make(tmp_path / "x"), metrics={"dev": {"f1": float("nan")}}))
    with server.client(ADMIN) as client:
        assert client.put("/v1/tasks/nan/metric", content=zipped(files)).status_code == 201
        for path in ("/v1/tasks", "/v1/tasks/nan/metric"):
            assert '"dev":{"f1":null}' in client.get(path).text
        assert client.delete("/v1/tasks/nan/metric").status_code == 204
    assert not (folder / "nan").exists()


def test_a_large_body_of_wrong_items(guarded: Guarded) -> None:
    """It is refused at its first one, or for its number: to tell of all takes gigabytes."""
    server, _ = guarded
    status = Path(f"/proc/{server.process.pid}/status")

    def peak_mb() -> float:
        (line,) = [x for x in status.read_text().splitlines() if x.startswith("VmHWM")]
        return int(line.split()[1]) / 1000

    before = peak_mb()
    with server.client(ADMIN) as client:
        for path, key in (("tasks/public/predict", "inputs"), ("predict", "items")):
            for item in ("0", "{}", "[]"):
                body = f'{{"{key}":[{",".join([item] * (1_900_000 // (len(item) + 1)))}]}}'
                response = client.post(f"/v1/{path}", content=body.encode())
                assert error(response)[1]["code"] in ("invalid", "too_large")
                assert response.status_code in (422, 413)
        many = ",".join(f'"k{number}":0' for number in range(150_000))
        for body in (f'{{"inputs":"x",{many}}}', f'{{"inputs":[{{{many}}}]}}'):
            response = client.post("/v1/tasks/public/predict", content=body.encode())
            assert "mistakes, too many to tell of" in error(response)[1]["message"]
        response = client.post("/v1/predict", content=f'{{"items":[{{{many}}}]}}'.encode())
        assert "items[0] has 150,002 mistakes" in response.json()["answers"][0]["error"]["message"]
        texts = ["x"] * 5000
        response = client.post("/v1/tasks/public/predict", json={"inputs": texts})
        assert response.status_code == 413
    assert peak_mb() - before < 400


def test_the_default_task_becomes_a_tagger(make: Make, tmp_path: Path) -> None:
    """Whoever asks it at that moment gets an answer of the old one, or a refusal."""
    make(tmp_path / "adapters/x")
    tagger = files_of(make(tmp_path / "y", kind="tag", labels=("O", "B-a", "I-a")))
    others = [make(tmp_path / f"z{number}", seed=number) for number in range(60)]
    seen: set[int] = set()
    is_over = threading.Event()
    with running(tmp_path / "adapters", tmp_path / "log", "--default-task", "x") as server:

        def ask_on() -> None:
            with server.client() as client:
                while not is_over.is_set():
                    seen.add(client.post("/predict", json={"inputs": "saw"}).status_code)

        askers = [threading.Thread(target=ask_on) for _ in range(4)]
        for asker in askers:
            asker.start()
        wait_until(lambda: 200 in seen)
        for other in others:  # they are read after it, and meanwhile the kind may not be known
            other.rename(tmp_path / "adapters" / other.name)
        for file, content in tagger.items():
            (tmp_path / "adapters/x" / file).write_bytes(content)
        wait_until(lambda: 422 in seen)
        is_over.set()
        for asker in askers:
            asker.join()
    assert seen == {200, 422}

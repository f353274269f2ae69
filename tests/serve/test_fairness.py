"""Callers who ask for much do not shut out those who ask for little."""

import threading
from collections import Counter
from pathlib import Path

import pytest

from tests.adapter_folder import LONG
from tests.serving import ADMIN, GLOBEX, running, write_tokens

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])


def test_a_queue_full_of_one_callers_texts_takes_another_in(folder: Path, tmp_path: Path) -> None:
    limits = ("--set", "queue_texts=64", "--set", "max_chars=100000", "--precision", "fp32")
    tokens = ("--tokens", str(write_tokens(tmp_path / "tokens.toml")))
    much: list[int] = []
    is_over = threading.Event()
    with running(folder, tmp_path / "log", *limits, *tokens) as server:

        def fill() -> None:
            with server.client(ADMIN) as client:
                while not is_over.is_set():
                    url = "/v1/tasks/acme/spans/predict"
                    much.append(client.post(url, json={"inputs": [LONG * 20] * 64}).status_code)

        threads = [threading.Thread(target=fill) for _ in range(3)]
        for thread in threads:
            thread.start()
        few = Counter[int]()
        with server.client(GLOBEX) as client:
            while min(much.count(200), much.count(429)) < 2:
                url = "/v1/tasks/globex/number/predict"
                few[client.post(url, json={"inputs": "saw"}).status_code] += 1
        is_over.set()
        for thread in threads:
            thread.join()
    assert set(much) == {200, 429}
    assert set(few) == {200}
    assert few.total() > 20

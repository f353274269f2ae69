"""What people serve many tasks with today, to be measured beside `pastina serve`.

    python -m pastina.bench.rivals peft|pipelines ORDERS

peft: one transformers model with a LoRA adapter (rank 8) and a head for each task by PEFT, behind
FastAPI; each request calls `set_adapter`, under a lock, for the model has one active adapter.
pipelines: a transformers pipeline for each task behind FastAPI, each with a model of its own.
"""

import json
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from pastina.bench.peers import _silence, classifier, classify_with_pipeline

_SHARE = 0.7  # of the free memory that may be taken


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _make_peft(folder: Path, count: int, num_labels: int, stop: float) -> Any:
    """An `answer(task, text)`, or why there is none."""
    import torch
    from peft import LoraConfig, get_peft_model

    tokenizer = _tokenizer(folder)
    config = LoraConfig(task_type="SEQ_CLS", r=8, init_lora_weights=False)
    with _silence():
        model: Any = get_peft_model(classifier(folder, num_labels), config, adapter_name="task0")
        for number in range(1, count):
            if time.monotonic() > stop:
                return f"after the time limit {number} of {count} adapters were loaded"
            model.add_adapter(f"task{number}", config)
    model.eval()
    lock = threading.Lock()
    labels = [f"class {i}" for i in range(num_labels)]

    def answer(task: str, text: str) -> dict[str, Any]:
        with lock, torch.inference_mode():
            model.set_adapter(task)
            logits = model(**tokenizer(text, truncation=True, return_tensors="pt")).logits[0]
        scores = torch.softmax(logits, -1).tolist()
        best = max(range(num_labels), key=scores.__getitem__)
        return {"label": labels[best], "score": scores[best]}

    return answer


def _make_pipelines(folder: Path, count: int, num_labels: int, stop: float) -> Any:
    """An `answer(task, text)`, or why there is none."""
    import psutil

    tokenizer, found, lock = _tokenizer(folder), dict[str, Any](), threading.Lock()
    free, started = psutil.virtual_memory().available, psutil.Process().memory_info().rss
    for number in range(count):
        if time.monotonic() > stop:
            return f"after the time limit {number} of {count} pipelines were loaded"
        found[f"task{number}"] = classify_with_pipeline(folder, tokenizer, num_labels)
        taken = psutil.Process().memory_info().rss - started
        if taken / (number + 1) * count > _SHARE * free and number >= min(3, count - 1):
            return (
                f"{count} pipelines need {taken / (number + 1) * count / 1e9:.0f} GB, and at most "
                f"{_SHARE:.0%} of the {free / 1e9:.0f} GB that are free are taken"
            )

    def answer(task: str, text: str) -> dict[str, Any]:
        with lock:
            return found[task](text, truncation=True)[0]

    return answer


def main() -> None:
    """Load, tell the port or why there is none on a line, and serve until stdin ends."""
    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel

    kind, orders = sys.argv[1], json.loads(sys.argv[2])
    make = {"peft": _make_peft, "pipelines": _make_pipelines}[kind]
    stop = time.monotonic() + orders["limit_s"]
    answer = make(Path(orders["backbone"]), orders["count"], orders["num_labels"], stop)
    if isinstance(answer, str):
        print(json.dumps({"reason": answer}), flush=True)
        return

    class Body(BaseModel):
        inputs: str

    app = FastAPI()

    @app.post("/v1/tasks/{task}/predict")
    def predict(task: str, body: Body) -> Any:  # in a thread, for it computes
        return answer(task, body.inputs)

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
    threading.Thread(target=_end_with_stdin, args=(server,), daemon=True).start()
    server.run(sockets=[listener])


def _end_with_stdin(server: Any) -> None:
    sys.stdin.read()
    server.should_exit = True


if __name__ == "__main__":
    main()

"""A server under attack: requests made from its own description, and archives that are broken."""

import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pastina.bench.broken import MARK, SORTS, broken_archives
from pastina.bench.copies import write_copies
from pastina.bench.served import Served, call, served
from pastina.bench.serving import ServeWork
from pastina.bench.work import Measured
from pastina.errors import PastinaError, need
from pastina.serve.access import token_file


def measure_fuzz(work: ServeWork) -> Measured:
    """Answers from 500 on, engines that died, and files that came to lie where they must not."""
    need("schemathesis", "dev")
    size = work.size
    place = work.scratch / "deep" / "er" / "place"
    folder = place / "adapters"
    write_copies(work.adapter, folder, 3)
    tokens, token = token_file(place / "tokens.toml")
    options = ("--tokens", str(tokens), "--uploads", "--default-task", "task1")
    with served(folder, work.scratch, *options) as server:
        whole = _content(folder)
        told = {
            "any_task": _schemathesis(server, token, size.examples, place),
            "one_task": _schemathesis(server, token, size.examples, place, "task1"),
        }
        work.tick(1 + size.archives // 20)
        after = _content(folder)
        answered: dict[str, dict[str, int]] = {sort: {} for sort in SORTS}
        files = {path.name: path.read_bytes() for path in (folder / "task1").iterdir()}
        for number, (sort, archive) in enumerate(broken_archives(files, size.archives)):
            url = f"{server.url}/v1/tasks/{('task0', 'new', 'acme/new')[number % 3]}"
            status, _ = call("PUT", url, archive, token)
            key = str(status)
            answered[sort][key] = answered[sort].get(key, 0) + 1
            if status in (200, 201):  # the damage was in what nobody reads
                call("PUT", f"{server.url}/v1/tasks/task0", _packed(folder / "task2"), token)
            if number % 20 == 19:
                work.tick(1 + size.archives // 20)
        escaped = _escaped(work.scratch, folder) + [
            name for name in _content(folder) if MARK in name
        ]
        starts = len(server.lines("ready"))
        is_alive = server.process.poll() is None
        errors = _server_errors(server.get("/metrics", token)[1])
    never = sum(statuses.get("0", 0) for statuses in answered.values())
    raw: dict[str, Any] = {
        "unit": "counts",
        "sorts": len(SORTS),
        "archives": answered,
        "schemathesis": told,
        "unchanged_by_schemathesis": whole == after,
        "errors": errors,
        "without_answer": never,
        "engine_starts": starts,
    }
    crashes = (starts - 1) + (not is_alive)
    return Measured(
        {"fuzz_5xx": sum(errors.values()) + crashes, "fuzz_escaped": len(escaped)},
        {"fuzz_5xx": raw, "fuzz_escaped": {"unit": "files", "files": escaped}},
    )


def _schemathesis(
    server: Served, token: str, examples: int, place: Path, task: str | None = None
) -> dict[str, Any]:
    """What schemathesis says to the description of the server, with an admin's token.

    task: asked wherever a path names one, so that not all of them end at its name; it is not deleted.
    """
    command = [sys.executable, "-m", "schemathesis.cli"]
    if task is not None:
        config = place / "schemathesis.toml"
        # who asks for an answer within a microsecond gets 504, as they should
        config.write_text(f'[parameters]\n"path.task" = "{task}"\n"query.timeout" = 20\n')
        command += ["--config-file", str(config)]
    command += ["run", f"{server.url}/openapi.json"]
    command += [] if task is None else ["--exclude-method", "DELETE"]
    command += ["--header", f"Authorization: Bearer {token}", "--max-examples", str(examples)]
    command += [
        "--checks",
        "not_a_server_error,response_schema_conformance,status_code_conformance",
    ]
    command += ["--seed", "1", "--exclude-path", "/metrics", "--no-color"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place)
    if done.returncode not in (0, 1):
        raise PastinaError(f"schemathesis failed: {(done.stdout + done.stderr)[-500:]}")
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    found = re.findall(r"(\d[\d,]*) generated", done.stdout)
    return {"is_content": done.returncode == 0, "generated": found, "last_lines": lines[-30:]}


def _server_errors(text: str) -> dict[str, float]:
    """Answers from 500 on, by status, from the server's own count; 503 and 504 are among them."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        match = re.match(r'pastina_requests_total\{.*status="(5\d\d)"\} ([\d.e+]+)', line)
        if match and 'route="/readyz"' not in line:  # which says 503 until it is ready
            found[match[1]] = found.get(match[1], 0) + float(match[2])
    return found


def _content(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _escaped(scratch: Path, folder: Path) -> list[str]:
    """Files with the mark in places where a path could have led."""
    places = [Path("/"), Path(tempfile.gettempdir()), Path.cwd(), *folder.parents[:4]]
    found = {str(path) for place in places for path in place.glob(f"*{MARK}*")}
    return sorted(found | {str(path) for path in scratch.rglob(f"*{MARK}*")})


def _packed(folder: Path) -> bytes:
    from pastina.bench.broken import packed

    return packed({path.name: path.read_bytes() for path in folder.iterdir()})

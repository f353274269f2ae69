"""What an import costs and does, each in an interpreter of its own."""

import subprocess
import sys

import pytest

import pastina


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", code],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_command_line_does_not_wait_for_torch() -> None:
    heavy = {"torch", "transformers", "peft", "accelerate", "numpy", "sklearn", "datasets"}
    code = f"""
import sys
import pastina.cli, pastina.recipe, pastina.errors
print("first", *sorted({heavy!r} & set(sys.modules)))
sys.argv = ["pastina", "recipe", "fit.lr=0.5"]
try:
    pastina.cli.main()
except SystemExit as end:
    assert not end.code, end.code
print("last", *sorted({heavy!r} & set(sys.modules)))
"""
    first, *recipe, last = python(code).split("\n")
    assert (first, last) == ("first", "last"), "a heavy package was imported"
    assert "lr = 0.5" in recipe


ORDERS = {
    "pastina first": "import pastina, peft",
    "peft first": "import peft, pastina",
    "a part of peft first": "import pastina; from peft.config import PeftConfig; import peft",
}


def test_peft_knows_pasta_in_any_order() -> None:
    """Each order in a process of its own, which has what PEFT needs but neither of the two."""
    code = f"""
import os, sys
import accelerate, torch, transformers.modeling_utils
assert not {{"peft", "pastina"}} & set(sys.modules)
for order in {list(ORDERS.values())!r}:
    child = os.fork()
    if child:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, order
        continue
    exec(order)
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known
    found = [name for name in ("PASTA", "LINEAR", "FULL") if name in known]
    config = peft.get_peft_config({{"peft_type": "PASTA", "task_type": "SEQ_CLS"}})
    found.append(type(config).__name__)
    found.append(any(type(finder).__module__.startswith("pastina") for finder in sys.meta_path))
    found += [peft.__spec__.name, type(peft.__loader__).__module__]
    print(*found, flush=True)
    os._exit(0)
"""
    lines = python(code).split("\n")
    assert len(lines) == len(ORDERS)
    for line in lines:
        assert line.startswith("PASTA LINEAR FULL PastaConfig "), line
        assert line.split()[4] == "False", "the finder goes when it has done its work"


def test_public_names() -> None:
    for name in pastina._HOME:
        assert getattr(pastina, name) is not None
        assert name in dir(pastina)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        pastina.nonsense  # noqa: B018
    assert len(pastina._HOME) <= 25

"""A Label Studio export becomes a tagger that finds products and dates.

    python examples/tagger_from_label_studio.py [FOLDER]

In Label Studio: Export, format "JSON". The export is written here, so that the example needs nothing
else; a real one has more tasks.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pastina
from pastina.recipe import make_recipe

# {product: ...} and {date: ...} mark what an annotator would have marked.
MESSAGES = (
    "Send me {product:two lamps} by {date:3 March}, please",
    "The {product:kettle} should come on {date:Friday}",
    "I ordered a {product:chair} on {date:12 May}",
    "Where is the {product:toaster}?",
    "Can you deliver the {product:sofa} {date:tomorrow}?",
    "It was to arrive on {date:1 June}",
    "The {product:lamp} is broken since {date:Monday}",
    "Please cancel the {product:table}",
    "I need the {product:mixer} before {date:20 April}",
    "Thank you for the {product:blue vase}",
    "The {product:desk} came on {date:Tuesday}",
    "Is the {product:radio} still available?",
    "Nobody was here on {date:7 July}",
    "I return the {product:coat} on {date:Sunday}",
    "A {product:garden chair} and a {product:parasol} for {date:next week}",
    "Hello, is anybody there?",
)


def as_task(number: int, message: str) -> dict[str, Any]:
    """The task of Label Studio's export for a marked message."""
    text, result = "", []
    for piece in message.replace("}", "{").split("{"):
        label, colon, marked = piece.partition(":")
        if colon and label in ("product", "date"):
            value = {"start": len(text), "end": len(text) + len(marked), "text": marked}
            result.append({"type": "labels", "value": {**value, "labels": [label]}})
        text += marked if colon else piece
    return {"id": number, "data": {"text": text}, "annotations": [{"result": result}]}


def main() -> None:
    """Write the export, train on it, find spans in a new message."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="pastina-"))
    export = folder / "export.json"
    tasks = [as_task(number, message) for number, message in enumerate(MESSAGES, start=1)]
    export.write_text(json.dumps(tasks, indent=1), encoding="utf-8")

    recipe = make_recipe(
        {
            "kind": "tag",
            "data": {"train": str(export), "dev_share": 0.2},
            "fit": {"epochs": 20, "batch": 4, "lr": 2e-2, "head_lr": 1e-2},
        }
    )
    run = pastina.train(recipe, folder / "run")
    print(f"{run.metric} {run.metrics[run.metric]:.2f} on dev, {run.adapter_bytes / 1000:.0f} kB")

    text = "Please bring the green armchair on 5 August"
    for span in pastina.load(run.adapter).predict([text])[0].spans or ():
        print(f"{span.label}: {text[span.start : span.end]} ({span.score:.2f})")


if __name__ == "__main__":
    main()

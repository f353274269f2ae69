"""Your own table: write a CSV, train a classifier on it, ask it something.

    python examples/own_csv.py [FOLDER]

The rows stand below only so that the example needs nothing else; a real table has more of them.
"""

import csv
import sys
import tempfile
from pathlib import Path

import pastina
from pastina.recipe import make_recipe

ROWS = {
    "track": (
        "Where is my parcel?",
        "The package has not arrived yet",
        "When will my order be delivered?",
        "The tracking page shows nothing",
        "Is my delivery late?",
        "My parcel seems to be lost",
        "The driver did not come today",
        "Has my order been shipped?",
    ),
    "refund": (
        "I want my money back",
        "When do I get my refund?",
        "You charged me twice",
        "The refund is too small",
        "Please return the 20 euros",
        "My card was debited by mistake",
        "I am still waiting for my money",
        "Pay back what I paid for the lamp",
    ),
}


def main() -> None:
    """Write tickets.csv, train on it, answer two texts."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="pastina-"))
    table = folder / "tickets.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows((text, label) for label, texts in ROWS.items() for text in texts)

    recipe = make_recipe(
        {
            "kind": "classify",
            "data": {"train": str(table), "dev_share": 0.25},
            # few rows: small batches and large rates, or it would not learn enough in the time
            "fit": {"epochs": 20, "batch": 4, "lr": 2e-2, "head_lr": 1e-2},
        }
    )
    run = pastina.train(recipe, folder / "run")
    print(f"{run.metric} {run.metrics[run.metric]:.2f} on dev, {run.adapter_bytes / 1000:.0f} kB")

    texts = ["Can you tell me where the package is?", "Give me back my money, please"]
    for text, answer in zip(texts, pastina.load(run.adapter).predict(texts), strict=True):
        print(f"{answer.label} ({answer.score:.2f}): {text}")


if __name__ == "__main__":
    main()

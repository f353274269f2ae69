"""Small data of our own: messages to a shop.

intents_{train,dev,test}.jsonl: 8 intents. orders_{train,dev,test}.jsonl: spans of products (without
article and number), dates and amounts of money.
"""

from importlib.resources import files
from pathlib import Path

from pastina.errors import DataError


def sample_path(name: str) -> Path:
    """The path of a sample file, such as `intents_train.jsonl`."""
    folder = Path(str(files(__name__)))
    path = folder / name
    names = sorted(file.name for file in folder.glob("*.jsonl"))
    if name not in names:
        raise DataError(f"There is no sample {name!r}. The samples are {', '.join(names)}.")
    return path

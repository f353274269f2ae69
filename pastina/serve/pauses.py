"""Python's garbage collector must not make requests wait."""

import gc


def settle() -> None:
    """What is there now stays, and is not looked at again: it is most of what there is, and looking
    through all of it takes as long as many requests."""
    gc.collect()
    gc.freeze()

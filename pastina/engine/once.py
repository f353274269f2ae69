"""What is made when it is first needed, by one thread."""

import threading
from functools import cached_property
from typing import Any, TypeVar

Value = TypeVar("Value")
MAKING = threading.RLock()  # one for all: what is made may need other such things


class once(cached_property[Value]):  # used like `cached_property`
    """A cached property that no two threads make at the same time.

    Kernels are told addresses of what was made. Python's own property (from 3.12 on) lets two threads
    make it, of which one is thrown away, and somebody may have its address.
    """

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        with MAKING:
            return super().__get__(instance, owner)

"""What kernels are told of is made by one thread."""

import threading
import time

from pastina.engine.once import once


class Slow:
    made = 0

    @once
    def inner(self) -> int:
        """Made slowly."""
        Slow.made += 1
        time.sleep(0.01)
        return Slow.made

    @once
    def outer(self) -> int:
        """Needs another one."""
        return 10 * self.inner


def test_made_once_however_many_ask() -> None:
    slow, found = Slow(), set()
    threads = [threading.Thread(target=lambda: found.add(slow.outer)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (found, Slow.made) == ({10}, 1)
    assert isinstance(Slow.outer, once)

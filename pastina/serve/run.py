"""A server from its settings: bound, running, and ended in good order."""

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from pastina.errors import PastinaError
from pastina.serve.access import Access
from pastina.serve.app import make_app
from pastina.serve.connections import Places
from pastina.serve.guard import guarded_protocol
from pastina.serve.logs import configure_logs
from pastina.serve.pauses import settle
from pastina.serve.server import Server
from pastina.serve.settings import Settings

_PROBES = 64  # connections above those whose requests are answered: for probes, and to hear a 503
_OWN_FILES = 128  # open for other reasons
_BACKLOG = 2048
logger = logging.getLogger("pastina.serve")


def serve(settings: Settings) -> None:
    """Serve until a signal ends it (SIGINT, SIGTERM).

    Raises:
        PastinaError: the folder, the tokens, the backbone or the address cannot be used.
    """
    if not settings.is_remote and not Path(settings.folder).is_dir():
        raise PastinaError(f"There is no folder {settings.folder}. Make it, or name another one.")
    if not settings.is_remote and (Path(settings.folder) / "task.json").is_file():
        raise PastinaError(f"{settings.folder} is an adapter. Name the folder in which it lies.")
    access = Access(settings.tokens)
    configure_logs(settings.log_level)
    server = Server(settings, access)
    listener = _listen(settings)
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    if settings.tokens is None:
        logger.warning("no tokens: this machine only", extra={"url": url})
    most = settings.connections + _PROBES
    most = min(most, _allow_files(most + _BACKLOG + _OWN_FILES) - _OWN_FILES)
    if most < settings.connections:
        logger.warning("the system lets fewer connections be open", extra={"connections": most})
    places = Places(max(most, 1), lambda which: server.metrics.lost.labels(which).inc())
    config = uvicorn.Config(
        make_app(server),
        http=guarded_protocol(settings.read_s, places),
        ws="none",
        access_log=False,
        log_config=None,
        server_header=False,
        date_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=settings.stop_s,
        backlog=_BACKLOG,
        proxy_headers=False,
    )
    with listener, asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_run(_Uvicorn(config), server, listener, url))


class _Uvicorn(uvicorn.Server):
    """uvicorn, which ends at a signal as if it had been asked to, with the exit code 0."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop, numbers = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            loop.add_signal_handler(number, self._end, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _end(self, number: int) -> None:
        self.force_exit = self.should_exit and number == signal.SIGINT  # the second Ctrl-C
        self.should_exit = True


async def _run(running: uvicorn.Server, server: Server, listener: socket.socket, url: str) -> None:
    serving = asyncio.create_task(running.serve(sockets=[listener]))
    while not running.started and not serving.done():
        await asyncio.sleep(0.01)
    logger.info("listening", extra={"url": url})
    starting = asyncio.create_task(server.link.ready())
    await asyncio.wait([serving, starting], return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        starting.cancel()
    failures = await asyncio.gather(starting, return_exceptions=True)
    if isinstance(failures[0], PastinaError):
        running.should_exit = True
        await serving
        raise failures[0]
    settle()
    await serving


def _allow_files(wanted: int) -> int:
    """How many files this process may have open; so many, if the system lets it."""
    if sys.platform == "win32":
        return wanted
    import resource

    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if now == resource.RLIM_INFINITY or now >= wanted:
        return wanted
    allowed = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, most))
    except (OSError, ValueError):  # a system with a limit that it does not tell
        return now
    return allowed


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    if sys.platform != "win32":
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host.strip("[]"), settings.port))
    except OSError as error:
        listener.close()
        raise PastinaError(
            f"{settings.host}:{settings.port} cannot be used: {error.strerror}. Choose another --port."
        ) from None
    listener.setblocking(False)
    return listener

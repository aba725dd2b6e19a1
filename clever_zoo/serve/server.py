"""Runs the application: address, signals, drain."""

import asyncio
import ipaddress
import logging
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from clever_zoo.serve.app import Service

logger = logging.getLogger(__name__)


class Connection(H11Protocol):
    """A connection that ends when no request comes.

    Uvicorn ends one that is silent after an answer. This ends those too that never ask, or never
    finish the headers, or go on with a body that was refused.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by asyncio."""
        super().connection_made(transport)
        self._await_request()

    def on_response_complete(self) -> None:
        """Called by uvicorn after an answer."""
        self._await_request()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        super().connection_lost(exc)
        self._stop_waiting()

    def _await_request(self) -> None:
        self._stop_waiting()
        self._deadline = self.loop.call_later(self.timeout_keep_alive, self._end_without_request)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()

    def _end_without_request(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.timeout_keep_alive_handler()


class DrainingServer(uvicorn.Server):
    """On SIGTERM or SIGINT first refuses new work and finishes what it took, then ends.

    While it drains it still listens, so that readiness is seen to be false. A second signal ends
    it at once.

    Args:
        app: From `create_app`.
        drain_timeout_s: Longest drain; requests that take longer are lost.
        idle_timeout_s: How long a connection may take to its first request, or the next one, with
            all its headers.
        access_log: Whether to log a line for each request.
        log_level: Of uvicorn's loggers.

    Attributes:
        lost: Requests that the drain left in work.
    """

    def __init__(
        self,
        app: FastAPI,
        *,
        drain_timeout_s: float = 30.0,
        idle_timeout_s: int = 10,
        access_log: bool = False,
        log_level: str = "warning",
    ) -> None:
        config = uvicorn.Config(
            app,
            # Of h11: httptools is faster and keeps headers of any length in memory.
            http=Connection,
            ws="none",
            lifespan="on",
            access_log=access_log,
            log_level=log_level,
            server_header=False,
            timeout_keep_alive=idle_timeout_s,
            timeout_graceful_shutdown=1,
        )
        super().__init__(config)
        # It warns of each malformed form, which the answer says already; clients could fill a log.
        logging.getLogger("python_multipart").setLevel(logging.ERROR)
        self._service: Service = app.state.service
        self._drain_timeout_s = drain_timeout_s
        self._drain_until_s: float | None = None
        self.lost = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by uvicorn on a signal; its own way would end the process with that signal."""
        if self._service.draining:
            self.force_exit = True
        self._service.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second; True ends its main loop."""
        stop = await super().on_tick(counter)
        if not self._service.draining:
            return stop
        if self._drain_until_s is None:
            self._drain_until_s = time.monotonic() + self._drain_timeout_s
            logger.warning("draining: %d requests in work", self._service.metrics.active)
        late = time.monotonic() > self._drain_until_s
        self.lost = self._service.metrics.active
        return self.lost == 0 or late or self.force_exit


def open_socket(host: str, port: int) -> socket.socket:
    """Listen on an address; port 0 takes any free one.

    Raises:
        OSError: If the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family, backlog=2048)
    # Connections inherit it; without it the end of an answer waits 40 ms for the client's ACK.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def is_loopback(listening: socket.socket) -> bool:
    """Whether only this machine reaches a socket."""
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback

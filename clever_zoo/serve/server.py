"""Runs the application: address, signals, drain."""

import ipaddress
import logging
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from clever_zoo.serve.app import Service

logger = logging.getLogger(__name__)


class DrainingServer(uvicorn.Server):
    """On SIGTERM or SIGINT first refuses new work and finishes what it took, then ends.

    While it drains it still listens, so that readiness is seen to be false. A second signal ends
    it at once.

    Args:
        app: From `create_app`.
        drain_timeout_s: Longest drain; requests that take longer are lost.
        access_log: Whether to log a line for each request.
        log_level: Of uvicorn's loggers.

    Attributes:
        lost: Requests in work at the end, None before.
    """

    def __init__(
        self,
        app: FastAPI,
        *,
        drain_timeout_s: float = 30.0,
        access_log: bool = False,
        log_level: str = "warning",
    ) -> None:
        config = uvicorn.Config(
            app,
            # httptools is faster and keeps headers of any length in memory.
            http="h11",
            ws="none",
            lifespan="on",
            access_log=access_log,
            log_level=log_level,
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        super().__init__(config)
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
    # Inherited by connections; without it an answer's end waits for the client's delayed ACK, 40 ms.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def is_loopback(listening: socket.socket) -> bool:
    """Whether only this machine reaches a socket."""
    return ipaddress.ip_address(listening.getsockname()[0]).is_loopback

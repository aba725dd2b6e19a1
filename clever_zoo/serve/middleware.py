"""Around every request: counting it, and bounding what its body may take."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clever_zoo.errors import RequestError
from clever_zoo.serve.metrics import Metrics

CLIENT_GONE = 499  # what a request counts as that ended before its answer


class CountRequests:
    """Counts requests in work, and done by handler and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = CLIENT_GONE

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.active += 1
        try:
            await self._app(scope, receive, watched)
        except Exception:  # answered further out, with 500
            status = 500 if status == CLIENT_GONE else status
            raise
        finally:
            self._metrics.active -= 1
            # Unknown paths share a label, or clients could make any number of them.
            handler = getattr(scope.get("endpoint"), "__name__", "unknown")
            self._metrics.requests.labels(handler, status).inc()


class BoundBodies:
    """Bounds the bytes of one body, and those of all bodies held at a time.

    A refusal is a RequestError out of `receive`, so that it ends what reads the body.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, max_held_bytes: int) -> None:
        self._app = app
        self._max_body_bytes, self._max_held_bytes = max_body_bytes, max_held_bytes
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        size = 0

        async def bounded() -> Message:
            nonlocal size
            self._check_size(int(declared))
            message = await receive()
            arrived = len(message.get("body", b""))
            size += arrived
            self._held_bytes += arrived
            self._check_size(size)
            if self._held_bytes > self._max_held_bytes:
                raise RequestError(
                    f"requests in work hold {self._max_held_bytes} bytes; try again",
                    503,
                    {"Retry-After": "1"},
                )
            return message

        try:
            await self._app(scope, bounded, send)
        finally:
            self._held_bytes -= size

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > self._max_body_bytes:
            raise RequestError(
                f"the body has {size_bytes} bytes or more, at most {self._max_body_bytes} are "
                "taken; send fewer images at a time",
                413,
            )

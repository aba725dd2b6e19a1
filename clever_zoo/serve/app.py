"""The application: KServe V2 for tensors, POST /embed for image files, metrics."""

import asyncio
import hmac
import re
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect

from clever_zoo import __version__
from clever_zoo.ahead import usable_cores
from clever_zoo.embedding import NOT_FINITE, Embedding, finite_rows
from clever_zoo.errors import ImageError, RequestError, SettingError
from clever_zoo.serve import MAX_IMAGE_PIXELS, protocol
from clever_zoo.serve.batcher import Batcher
from clever_zoo.serve.decoder import Decoder, File, Square
from clever_zoo.serve.metrics import Metrics
from clever_zoo.serve.middleware import CLIENT_GONE, BoundBodies, CountRequests
from clever_zoo.serve.model import Outputs, ServedModel

Result = TypeVar("Result")


@dataclass(frozen=True)
class Limits:
    """How the service batches and what it refuses.

    Attributes:
        max_batch: Images per batch.
        max_delay_s: How long an image waits for others to share its batch.
        max_queue: Images that may wait for a batch, files that may be decoded or wait for it,
            and images of one request.
        max_body_bytes: Largest body, as sent and as unpacked; all bodies in work together may
            hold four times as much as sent.
        max_image_pixels: Largest picture that is decoded.
        body_timeout_s: How long a body may take to arrive.
    """

    max_batch: int = 32
    max_delay_s: float = 0.005
    max_queue: int = 256
    max_body_bytes: int = 64 << 20
    max_image_pixels: int = MAX_IMAGE_PIXELS
    body_timeout_s: float = 60.0


class Service:
    """A model in service: what all requests share.

    Attributes:
        draining: Set to refuse new work.
    """

    def __init__(self, model: ServedModel, limits: Limits, token: str | None) -> None:
        self.model, self.limits, self.token = model, limits, token
        self.metrics = Metrics()
        self.batcher = Batcher(
            model.run,
            max_batch=limits.max_batch,
            max_delay_s=limits.max_delay_s,
            max_queue=limits.max_queue,
            metrics=self.metrics,
        )
        self.decoder = Decoder(
            model.preprocess,
            max_pixels=limits.max_image_pixels,
            max_files=limits.max_queue,
            metrics=self.metrics,
        )
        # Parses and writes JSON; the event loop only moves bytes.
        self.pool = ThreadPoolExecutor(usable_cores(), thread_name_prefix="parse")
        self.draining = False

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Run batches while the application is up."""
        with self.pool, self.decoder.pool:
            async with self.batcher.running():
                yield

    async def in_pool(self, function: Callable[..., Result], *args: Any) -> Result:
        """Call a function in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, function, *args)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceOf = Annotated[Service, Depends(_service)]
_bearer = HTTPBearer(auto_error=False, description="The token the service was started with.")


def _authorize(
    service: ServiceOf,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> None:
    if service.token is None:
        return
    if credentials is None or not hmac.compare_digest(
        credentials.credentials.encode(), service.token.encode()
    ):
        raise RequestError(
            "the token is missing or wrong; send the header 'Authorization: Bearer TOKEN'",
            401,
            {"WWW-Authenticate": "Bearer"},
        )


def _check_name(service: ServiceOf, name: str) -> None:
    if name not in (service.model.name, service.model.alias):
        raise RequestError(
            f"model {name!r} is not served here; {service.model.name!r} is, see GET /v2", 404
        )


def _check_version(version: str) -> None:
    if version != protocol.VERSION:
        raise RequestError(f"there is no version {version!r}, only {protocol.VERSION!r}", 404)


def _admit(service: ServiceOf) -> None:
    """Refuse work that cannot be taken, before its body is read."""
    if service.draining:
        raise RequestError(
            "the service is shutting down; ask another or try again later",
            503,
            {"Retry-After": "5", "Connection": "close"},
        )
    service.batcher.check_room()


health = APIRouter(prefix="/v2/health", tags=["health"])
private = APIRouter(dependencies=[Depends(_authorize)])
models = APIRouter(dependencies=[Depends(_authorize), Depends(_check_name)], tags=["KServe V2"])


@health.get("/live")
async def live() -> Response:
    """Whether the process answers; needs no token."""
    return JSONResponse({"live": True})


@health.get("/ready")
async def ready(service: ServiceOf) -> Response:
    """Whether requests are taken: 503 from the moment the service is told to stop."""
    return JSONResponse({"ready": not service.draining}, 503 if service.draining else 200)


@private.get("/v2", tags=["KServe V2"])
async def server_metadata() -> Response:
    """Name, version and extensions."""
    return JSONResponse(protocol.server_metadata())


@private.get("/metrics", tags=["metrics"])
async def metrics(service: ServiceOf) -> Response:
    """Counters in Prometheus' text format."""
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@private.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request) -> Response:
    """The description of all paths."""
    app: FastAPI = request.app
    return JSONResponse(app.openapi())


@models.get("")
async def model_metadata(service: ServiceOf) -> Response:
    """Inputs, outputs, and the digest of the weights."""
    return JSONResponse(protocol.model_metadata(service.model))


@models.get("/ready")
async def model_ready(service: ServiceOf) -> Response:
    """As /v2/health/ready."""
    return await ready(service)


@models.get("/config")
async def model_config(service: ServiceOf) -> Response:
    """The part of Triton's model configuration that has a meaning here."""
    limits = service.limits
    config = protocol.model_config(service.model, limits.max_batch, limits.max_delay_s)
    return JSONResponse(config)


@models.post("/infer", dependencies=[Depends(_admit)])
async def infer(request: Request, service: ServiceOf) -> Response:
    """Tensor `pixels` (B, size, size, 3) UINT8 RGB in, the two halves out; JSON or binary."""
    body = await _read_body(request, service.limits)
    parsed = await service.in_pool(_parse, body, request, service)
    outputs = await _unless_gone(request, service.batcher.submit(parsed.pixels))
    content, headers = await service.in_pool(
        protocol.encode_response, service.model, parsed, outputs
    )
    return Response(content, headers=headers)


class ImageResult(BaseModel):
    """What became of one file: both halves, or why there are none."""

    name: str
    invariant: list[float] | None = None
    equivariant: list[float] | None = None
    error: str | None = None


class EmbedResponse(BaseModel):
    """Results in the order of the files, the model's full name and the digest of its weights."""

    images: list[ImageResult]
    model: str
    sha256: str
    error: str | None = None


_BINARY = {"schema": {"type": "string", "format": "binary"}}
_FILES = {"type": "object", "additionalProperties": {"type": "string", "format": "binary"}}
_EMBED_BODY = {"multipart/form-data": {"schema": _FILES}, "image/*": _BINARY}


@private.post(
    "/embed",
    dependencies=[Depends(_admit)],
    tags=["images"],
    responses={200: {"model": EmbedResponse}},
    openapi_extra={"requestBody": {"required": True, "content": _EMBED_BODY}},
)
async def embed(request: Request, service: ServiceOf) -> Response:
    """Embed image files: a multipart form with any number of them, or one as the body.

    A file that is no image has an `error` in its place; with no image at all the status is 400.
    """
    if "invariant" not in service.model.outputs:
        raise RequestError(
            f"{service.model.name} is a classifier, it has no embedding; "
            f"POST pixels to /v2/models/{service.model.name}/infer",
            404,
        )
    service.decoder.check_room()
    files = await _read_files(request, service.limits)
    squares = await _unless_gone(request, service.decoder.decode(files))
    good = [square for square in squares if not isinstance(square, ImageError)]
    outputs: Outputs = {}
    if good:
        outputs = await _unless_gone(request, service.batcher.submit(np.stack(good)))
    content = await service.in_pool(_encode_images, files, squares, outputs, service.model)
    return Response(content, 200 if good else 400, media_type="application/json")


async def _read_body(request: Request, limits: Limits) -> bytearray:
    body = bytearray()
    async with _arriving_in(limits.body_timeout_s):
        async for chunk in request.stream():
            body += chunk
    return body


async def _read_files(request: Request, limits: Limits) -> list[File]:
    content_type = request.headers.get("content-type", "")
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise RequestError(
            f"Content-Encoding is {encoding!r}; send image files as they are, they are packed "
            "already",
            415,
        )
    if content_type.lower().startswith("image/"):
        return [File("body", await _read_body(request, limits))]
    if not content_type.lower().startswith("multipart/form-data"):
        raise RequestError(
            f"Content-Type is {content_type!r}; send multipart/form-data with files, or one file "
            "as image/jpeg, image/png or another image type",
            415,
        )
    async with (
        _arriving_in(limits.body_timeout_s),
        request.form(max_files=limits.max_queue) as form,
    ):
        uploads = [item for _, item in form.multi_items() if isinstance(item, UploadFile)]
        files = [File(upload.filename or "", await upload.read()) for upload in uploads]
    if not files:
        raise RequestError("the form holds no file; send at least one, as in curl -F a=@PATH")
    return files


@asynccontextmanager
async def _arriving_in(timeout_s: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise RequestError(f"the body did not arrive within {timeout_s:g} s", 408) from error


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client hangs up."""
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


def _parse(body: bytearray, request: Request, service: Service) -> protocol.InferRequest:
    limits = service.limits
    content = _decompress(
        body, request.headers.get("content-encoding", "identity"), limits.max_body_bytes
    )
    header_length = request.headers.get(protocol.HEADER_LENGTH)
    return protocol.parse_request(content, header_length, service.model, limits.max_queue)


def _decompress(body: bytearray, encoding: str, max_bytes: int) -> bytes | bytearray:
    encoding = encoding.lower()
    if encoding == "identity":
        return body
    if encoding not in ("gzip", "deflate"):
        raise RequestError(f"Content-Encoding is {encoding!r}; use gzip, deflate or none", 415)
    stream = zlib.decompressobj(zlib.MAX_WBITS | 32)  # reads the headers of both
    try:
        content = stream.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise RequestError(f"the body is not {encoding}: {error}") from error
    if len(content) > max_bytes:
        raise RequestError(f"the body unpacks to more than {max_bytes} bytes", 413)
    if not stream.eof or stream.unused_data:
        raise RequestError(f"the body is not one whole {encoding} stream")
    return content


def _encode_images(
    files: list[File],
    squares: list[Square],
    outputs: Outputs,
    model: ServedModel,
) -> str:
    rows = _image_rows(outputs) if outputs else iter(())
    images = [
        ImageResult(name=file.name, error=square.reason)
        if isinstance(square, ImageError)
        else ImageResult(name=file.name, **next(rows))
        for file, square in zip(files, squares, strict=True)
    ]
    error = None if outputs else "no file is a readable image; see the error of each"
    response = EmbedResponse(images=images, model=model.name, sha256=model.sha256, error=error)
    return response.model_dump_json(exclude_none=True)


def _image_rows(outputs: Outputs) -> Iterator[dict[str, Any]]:
    """What is said of each image that was embedded."""
    embedding = Embedding(*(outputs[name] for name in Embedding._fields))
    halves = (half.tolist() for half in embedding)
    for finite, *values in zip(finite_rows(embedding), *halves, strict=True):
        yield dict(zip(Embedding._fields, values, strict=True)) if finite else {"error": NOT_FINITE}


async def _on_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return JSONResponse({"error": str(error)}, error.status, error.headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """What FastAPI itself refuses: unknown paths and methods, malformed forms."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}; see /openapi.json"
    return JSONResponse({"error": message}, error.status_code, error.headers)


async def _on_client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)  # read by nobody but the counter


async def _on_crash(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "internal error; the service's log says more"}, 500)


def create_app(model: ServedModel, limits: Limits = Limits(), token: str | None = None) -> FastAPI:
    """Build the ASGI application.

    Args:
        model: What to serve.
        limits: Batching and bounds.
        token: Bearer token that all but /v2/health asks for; None: open to all.

    Raises:
        SettingError: If the token is empty or holds what a header cannot carry.
    """
    if token is not None and not re.fullmatch("[!-~]+", token):
        raise SettingError(
            f"the token has {len(token)} characters; it needs one at least, all of them visible "
            "ASCII without spaces or line ends. Set another, or none to be open to all"
        )
    service = Service(model, limits, token)
    app = FastAPI(
        title="clever-zoo",
        description=f"Embeddings of {model.name} in two labelled halves.",
        version=__version__,
        openapi_url=None,  # served with the paths that ask for the token
        # The pages would load their scripts from a CDN.
        docs_url=None,
        redoc_url=None,
        lifespan=service.lifespan,
    )
    app.state.service = service
    app.include_router(health)
    app.include_router(private)
    app.include_router(models, prefix="/v2/models/{name}")
    versioned = [Depends(_check_version)]
    app.include_router(
        models,
        prefix="/v2/models/{name}/versions/{version}",
        dependencies=versioned,
        include_in_schema=False,
    )
    for kind, handler in {
        RequestError: _on_request_error,
        HTTPException: _on_http_error,
        ClientDisconnect: _on_client_gone,
        Exception: _on_crash,
    }.items():
        app.add_exception_handler(kind, handler)
    # The last is the outermost.
    app.add_middleware(GZipMiddleware, compresslevel=1)
    app.add_middleware(
        BoundBodies,
        max_body_bytes=limits.max_body_bytes,
        max_held_bytes=4 * limits.max_body_bytes,
    )
    app.add_middleware(CountRequests, metrics=service.metrics)
    return app

"""The bulk operator on Ray Data: the same chunks, embedded by the workers of a cluster."""

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clever_zoo.bulk import Options, embed_chunks
from clever_zoo.bulk_parts import Chunk
from clever_zoo.embedder import ImageEmbedder, Progress
from clever_zoo.errors import BackendMissingError, EngineError, ImageError


class RayEngine:
    """Embeds chunks in the workers of a Ray cluster, each with its own copy of the encoder.

    The cluster is the one that this process is connected to, else that of RAY_ADDRESS or of
    `ray start` on this machine, else a local one for the time of the run. Its machines have to
    see the pictures and the model under the same paths. A chunk of a worker that dies is embedded
    again by another.

    Args:
        load: Loads the encoder; called once in each worker.
        workers: How many; None for one per core of the cluster, or per GPU.
        gpus_per_worker: 0 or 1.

    Raises:
        BackendMissingError: If Ray is not installed.
    """

    def __init__(
        self,
        load: Callable[[], ImageEmbedder],
        *,
        workers: int | None = None,
        gpus_per_worker: int = 0,
    ) -> None:
        try:
            import pyarrow
            import ray.data
        except ImportError as error:
            raise BackendMissingError(
                f'Ray Data needs {error.name}: pip install "clever-zoo[ray]"'
            ) from error
        self._ray: Any = ray
        self._arrow: Any = pyarrow
        self._load, self._workers, self._gpus = load, workers, gpus_per_worker

    def __call__(
        self, chunks: Iterable[Chunk], options: Options, on_progress: Progress
    ) -> Iterator[tuple[int, bytes]]:
        """Embed chunks in the cluster; parts come as they are done, in any order.

        Raises:
            ImageError: With on_error="raise".
            BackendMissingError: If the cluster has no GPU, and needs one.
            EngineError: If the workers fail otherwise.
        """
        with self._cluster():
            # In Ray's store and not here: a million paths would be a few hundred megabytes.
            blocks = [self._ray.put(self._block(chunk)) for chunk in chunks]
            if not blocks:
                return
            try:
                for row in self._dataset(blocks, options).iter_rows():
                    if row["error"]:
                        raise ImageError(*json.loads(row["error"]))
                    on_progress(row["files"])
                    yield row["number"], row["content"]
            except self._ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[-1]
                raise EngineError(
                    f"Ray stopped: {reason}; mend that and resume, what is done is kept"
                ) from error

    def _block(self, chunk: Chunk) -> Any:
        return self._arrow.table(
            {
                "number": [chunk.number],
                "first": [chunk.first],
                "paths": [json.dumps(chunk.paths)],  # it keeps names that are not valid UTF-8
            }
        )

    def _dataset(self, blocks: list[Any], options: Options) -> Any:
        kind = "GPU" if self._gpus else "CPU"
        available = int(self._ray.cluster_resources().get(kind, 0))
        if not available:
            raise BackendMissingError(
                f"the Ray cluster has no {kind}; add one or change the device"
            )
        workers = min(self._workers or available, len(blocks))
        return self._ray.data.from_arrow_refs(blocks).map(
            _Worker,
            fn_constructor_args=(self._load, options, Path.cwd()),
            compute=self._ray.data.ActorPoolStrategy(size=workers),
            num_cpus=1,
            num_gpus=self._gpus,
        )

    @contextmanager
    def _cluster(self) -> Iterator[None]:
        if self._ray.is_initialized():
            yield
            return
        # Ray reads these when it starts; no report is sent, and stderr is for our progress.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        self._ray.init(logging_level=logging.ERROR, log_to_driver=False)
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised too
        self._ray.data.DataContext.get_current().enable_progress_bars = False
        try:
            yield
        finally:
            self._ray.shutdown()


class _Worker:
    """Loads an encoder once and embeds chunk after chunk."""

    def __init__(self, load: Callable[[], ImageEmbedder], options: Options, folder: Path) -> None:
        os.chdir(folder)  # relative paths mean what they mean to the caller
        self._encoder = load()
        self._options = options._replace(threads=options.threads or 1)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        chunk = Chunk(row["number"], row["first"], json.loads(row["paths"]))
        result = {"number": chunk.number, "files": len(chunk.paths), "content": b"", "error": ""}
        try:
            [(_, result["content"])] = embed_chunks(self._encoder, [chunk], self._options)
        except ImageError as error:  # as values: Ray does not hand on an exception whole
            result["error"] = json.dumps([error.source, error.index, error.reason])
        return result

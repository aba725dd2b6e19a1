"""Tar shards: local, over loopback HTTP, and through huggingface_hub."""

import hashlib
import io
import pickle
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clever_zoo.errors import DataError
from clever_zoo.preprocess import crop_pixels, load_image
from clever_zoo.samples import sample_paths
from training.config import DataConfig
from training.data import load_split, load_train_images
from training.data.shards import find_shards

SIZE = 16
PATHS = sample_paths()[::30]


def config(**changes) -> DataConfig:
    return DataConfig(dataset="webdataset", image_size_px=SIZE, **changes)


def write_shard(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def encoded(path: Path, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.open(path).convert("RGB").save(buffer, kind, lossless=True)
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards of five pictures: PNG and lossless WebP, so that the pixels are known."""
    for shard in range(2):
        members = []
        for i, path in enumerate(PATHS[5 * shard : 5 * shard + 5]):
            kind = ("png", "webp")[i % 2]
            members += [
                (f"a.b/{i}.{kind}", encoded(path, kind)),
                (f"a.b/{i}.cls", f"{i}\n".encode()),
                (f"a.b/{i}.json", b"{}"),
            ]
        write_shard(tmp_path / f"train-{shard:06}.tar", members)
    return tmp_path


def expected_squares() -> torch.Tensor:
    squares = [crop_pixels(load_image(path), SIZE, SIZE) for path in PATHS]
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("cache", ["memory", "disk", "stream"])
def test_samples_of_local_shards(shards: Path, cache: str) -> None:
    data = load_train_images(config(shards="train-{000000..000001}.tar", cache=cache), shards)
    data = pickle.loads(pickle.dumps(data))  # noqa: S301, as for a spawned worker
    assert torch.equal(data.__getitems__(range(10)).images, expected_squares())
    assert data.labels.tolist() == [0, 1, 2, 3, 4] * 2
    assert data.class_names == ("0", "1", "2", "3", "4")
    assert not {p.name for p in shards.iterdir()} - {
        "cache",
        "train-000000.tar",
        "train-000001.tar",
    }


def test_a_corrupt_member_is_replaced(shards: Path) -> None:
    write_shard(
        shards / "train-000000.tar",
        [("x.jpg", b"no"), ("x.cls", b"1"), ("y.png", encoded(PATHS[0], "png")), ("y.cls", b"0")],
    )
    batch = load_train_images(config(shards="train-000000.tar"), shards).__getitems__([0, 1])
    assert torch.equal(batch.images[0], batch.images[1])
    assert batch.replaced.tolist() == [0]


def test_a_shard_that_vanishes_is_named(shards: Path) -> None:
    stream = config(shards="train-{000000..000001}.tar", cache="stream", max_bad_images=2)
    data = load_train_images(stream, shards)
    (shards / "train-000000.tar").unlink()
    with pytest.raises(DataError, match=r"train-000000\.tar, member \S+: the shard cannot be read"):
        data.__getitems__([0, 7])


def test_all_problems_of_all_shards_are_listed(shards: Path) -> None:
    png = encoded(PATHS[0], "png")
    write_shard(
        shards / "train-000000.tar",
        [
            ("a.png", png),
            ("b.png", png),
            ("b.cls", b"two"),
            ("c.cls", b"1"),
            ("d.png", png),
            ("d.cls", b"1"),
            ("d.jpg", png),
        ],
    )
    (shards / "train-000002.tar").write_bytes(b"no tar")
    write_shard(shards / "train-000003.tar", [])
    with pytest.raises(DataError) as caught:
        load_split(config(shards="train-{000000..000003}.tar"), shards, "train")
    for text in (
        "1 images without .cls: a",
        "1 .cls members without an image: c",
        "no class number: b.cls",
        "duplicate key 'd' (d.jpg)",
        "train-000002.tar is no whole",
    ):
        assert text in str(caught.value)
    with pytest.raises(DataError, match="no sample"):
        load_split(config(shards="train-000003.tar"), shards, "train")


@pytest.mark.parametrize("kept", [100, 512, 1000, -1024, -10_000])
def test_a_shard_cut_short_is_named(shards: Path, kept: int) -> None:
    """In a header, in an image, between members, before the end mark."""
    path = shards / "train-000001.tar"
    with tarfile.open(path) as tar:
        end = max(m.offset_data + -(-m.size // 512) * 512 for m in tar)
    content = path.read_bytes()
    path.write_bytes(content[: kept if kept > 0 else end + kept + 1024])
    with pytest.raises(DataError, match=r"1 problem\S+\s+- \S+train-000001.tar"):
        load_split(config(shards="train-{000000..000001}.tar"), shards, "train")


def test_patterns_that_match_nothing(shards: Path) -> None:
    with pytest.raises(DataError, match=r"1 of the 3 shards .* train-000002\.tar; there are train"):
        load_split(config(shards="train-{000000..000002}.tar"), shards, "train")
    with pytest.raises(DataError, match=r"no \.tar files"):
        load_split(config(shards="a.tar"), shards / "cache", "train")
    with pytest.raises(DataError, match="braces"):
        load_split(config(shards="train-{0.tar"), shards, "train")
    with pytest.raises(DataError, match="names a shard twice"):
        load_split(config(shards="{a,a}.tar"), shards, "train")
    with pytest.raises(DataError, match="test_shards"):
        load_split(config(shards="train-{000000..000001}.tar"), shards, "test")
    for pattern in ("a.tar", "http://127.0.0.1/a.tar"):
        with pytest.raises(DataError, match="--data DIR"):
            load_split(config(shards=pattern), None, "train")


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; files named cut-* end before their Content-Length."""

    requests: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.requests.append(self.path)
        super().do_GET()

    def copyfile(self, source, outputfile) -> None:
        content = source.read()
        if "cut-" in self.path:
            content, self.close_connection = content[: len(content) // 2], True
        outputfile.write(content)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def served(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Handler.requests.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(shards)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_shards_over_http_are_fetched_once(served: str, tmp_path: Path) -> None:
    remote = config(shards=f"{served}/train-{{000000..000001}}.tar")
    for _ in range(2):
        data = load_split(remote, tmp_path / "here", "train")
        assert torch.equal(data.images, expected_squares())
    assert sorted(Handler.requests) == ["/train-000000.tar", "/train-000001.tar"]
    stored = sorted((tmp_path / "here/cache/shards").rglob("*.tar"))
    assert [path.name for path in stored] == ["train-000000.tar", "train-000001.tar"]


def test_a_torn_transfer_leaves_nothing_and_is_named(served: str, shards: Path) -> None:
    (shards / "cut-1.tar").write_bytes((shards / "train-000000.tar").read_bytes())
    here = shards / "here"
    with pytest.raises(DataError, match="2 problem") as caught:
        find_shards(f"{served}/{{train-000000,cut-1,absent}}.tar", None, here)
    assert "cut-1.tar was cut short" in str(caught.value)
    assert "absent.tar could not be fetched" in str(caught.value)
    assert "404" in str(caught.value)
    kept = [path.name for path in here.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert kept == ["train-000000.tar"]


def test_an_unreachable_server_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="could not be fetched"):
        find_shards("http://127.0.0.1:9/a.tar", None, tmp_path)


class HubHandler(Handler):
    """What huggingface_hub asks of a Hub to download a file of a data set."""

    def send_head(self):
        prefix = "/datasets/org/name/resolve/main/"
        path = Path(self.directory, self.path.removeprefix(prefix))
        if not self.path.startswith(prefix) or not path.is_file():
            self.send_error(404)
            return None
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        return io.BytesIO(content)


def test_shards_of_the_hub(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client, which keeps the file in its own cache."""
    from huggingface_hub import constants

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(HubHandler, directory=str(shards)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(shards / "hub"))
    url = "hf://datasets/org/name@main/train-{000000..000001}.tar"
    data = load_split(config(shards=url), None, "train")
    assert torch.equal(data.images, expected_squares())
    assert list((shards / "hub").rglob("train-000001.tar"))
    with pytest.raises(DataError, match=r"absent\.tar could not be fetched"):
        find_shards("hf://datasets/org/name/absent.tar", None, None)
    with pytest.raises(DataError, match="ORG/NAME"):
        find_shards("hf://org/name/absent.tar", None, None)
    server.shutdown()
    server.server_close()

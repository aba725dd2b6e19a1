"""Publishing: the folder that goes up, what is refused, and the way to the Hub and back."""

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

import clever_zoo
from clever_zoo import publish
from clever_zoo.cards import render_card
from clever_zoo.cli import app
from clever_zoo.errors import (
    DataError,
    IntegrityError,
    SourceError,
    SpecError,
    UnknownModelError,
)
from clever_zoo.files import SUMS_FILENAME, read_sums, write_atomic, write_sums
from clever_zoo.locate import ONNX_FILENAME
from clever_zoo.records import RESULTS_FILENAME, Record
from clever_zoo.samples import sample_paths
from clever_zoo.spec import CONFIG_FILENAME, ModelSpec
from tests.hub_server import (
    TOKEN,
    Answer,
    Fault,
    Request,
    StandIn,
    read_tree,
    run_client,
    running_hub,
)

NAME = "clever-resnet18.fmnist"
REPO = f"org/{NAME}"
CARDS = Path(__file__).parents[2] / "model_cards"


@pytest.fixture
def hub() -> Iterator[StandIn]:
    with running_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / NAME
    assert publish.build(NAME, folder).name == NAME
    assert publish.check_built(folder) == clever_zoo.model_info(NAME)
    return folder


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    """Of links, so that a change must replace its file."""
    return Path(shutil.copytree(built, tmp_path / "copy", copy_function=os.link))


def commands(hub: StandIn, home: Path, *lines: tuple[str, ...]) -> list[str]:
    """What `clever-zoo publish ...` says, several times in one process with the real client.

    It does not check the folder, which takes long: it is one that was checked here.
    """
    home.mkdir(exist_ok=True)
    code = f"""
import json
from typer.testing import CliRunner
from clever_zoo import model_info, publish
from clever_zoo.cli import app
publish.check_built = lambda folder: model_info({NAME!r})
run = CliRunner().invoke
print(json.dumps([run(app, ("publish", *arguments)).output for arguments in {lines!r}]))
"""
    return json.loads(run_client(code, hub, home, HF_TOKEN=TOKEN))


def test_published_and_loaded_again_a_model_gives_the_same_to_the_bit(
    built: Path, hub: StandIn, tmp_path: Path
) -> None:
    pictures = [str(path) for path in sample_paths()[::30]]
    original = clever_zoo.from_pretrained(NAME).embed(pictures)

    (said,) = commands(hub, tmp_path / "owner", ("push", str(built), "--repo", REPO))

    commit = hub.repos[REPO].refs["main"]
    assert f'HubPin("{REPO}", "{commit}")' in said

    load_and_embed = f"""
import clever_zoo, numpy as np
encoder = clever_zoo.from_pretrained("hf-hub:{REPO}@{commit}")
assert encoder.spec == clever_zoo.model_info("{NAME}")
np.savez("torch.npz", **encoder.embed({pictures})._asdict())
encoder = clever_zoo.OnnxEncoder.from_pretrained("{REPO}", threads=1)
np.savez("onnx.npz", **encoder.embed({pictures})._asdict())
"""
    run_client(load_and_embed, hub, tmp_path / "user")

    for runtime, distance in (("torch", 0.0), ("onnx", 1e-4)):
        with np.load(tmp_path / "user" / f"{runtime}.npz") as loaded:
            for name, half in original._asdict().items():
                difference = np.linalg.norm(loaded[name] - half, axis=1)
                assert (difference <= distance * np.linalg.norm(half, axis=1)).all()


def test_the_folder_holds_exactly_what_goes_up(built: Path) -> None:
    assert set(read_tree(built)) == {
        *("README.md", "config.json", "model.safetensors", "onnx/model.onnx", "results.json"),
        *("golden.json", "figures/drift.svg", "figures/perturbed.svg", "SHA256SUMS"),
    }
    for name, content in read_tree(CARDS / NAME).items():
        assert (built / name).read_bytes() == content
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=built, capture_output=True)
    assert checked.returncode == 0, checked.stdout


def test_building_again_gives_the_same_bytes(built: Path, onnx_models: Path) -> None:
    """The same model was exported for other tests, by another process."""
    graph = (built / "onnx/model.onnx").read_bytes()
    assert graph == (onnx_models / "resnet18.onnx").read_bytes()


@pytest.mark.slow
def test_building_twice_gives_the_same_bytes(built: Path, tmp_path: Path) -> None:
    publish.build(f"local-dir:{CARDS / NAME}", tmp_path / "again")
    assert read_tree(tmp_path / "again") == read_tree(built)


def test_what_cannot_be_built(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    partial = shutil.copytree(CARDS / NAME, tmp_path / "partial")
    (partial / "golden.json").unlink()
    other = shutil.copytree(CARDS / NAME, tmp_path / "other")
    golden = json.loads((other / "golden.json").read_text())
    golden["invariant"][0] += 1
    (other / "golden.json").write_text(json.dumps(golden))
    unreleased = shutil.copytree(other, tmp_path / "unreleased")
    for name in ("config.json", RESULTS_FILENAME):
        path = unreleased / name
        path.write_text(path.read_text().replace(NAME, "clever-resnet18.mine"))
    spec = ModelSpec.read(unreleased / "config.json")
    record = Record.read(unreleased / RESULTS_FILENAME)
    (unreleased / "README.md").write_text(render_card(spec, record))
    for source, target, kind, words in (
        ("clever-resnet19", "new", UnknownModelError, "clever-resnet18"),
        ("org/model", "new", SourceError, "is a repository on the Hub"),
        (f"local-dir:{partial}", "new", DataError, "lacks golden.json"),
        (f"local-dir:{other}", "new", IntegrityError, "golden.json differs from"),
        (f"local-dir:{unreleased}", "new", IntegrityError, "golden.json: embeddings differ"),
        (NAME, "full", DataError, "is not empty"),
        (NAME, "new/..", DataError, "names no new folder"),
    ):
        with pytest.raises(kind, match=words):
            publish.build(source, tmp_path / target)
    with pytest.raises(DataError, match=r"'\.' names no new folder"):
        publish.build(NAME, ".")
    assert not (tmp_path / "new").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]


def edited(name: str, edit: Callable[[bytes], bytes], *, listed: bool) -> Callable[[Path], None]:
    """A change of one file, with or without its digest brought up to date."""

    def change(folder: Path) -> None:
        write_atomic(folder / name, edit((folder / name).read_bytes()))
        if listed:
            write_sums(folder)

    return change


def other_weights(folder: Path) -> None:
    """A consistent encoder that is not the one the registry has under this name."""
    encoder = clever_zoo.from_pretrained(folder)
    next(encoder.backbone.parameters()).data.mul_(2)
    others = {name: (folder / name).read_bytes() for name in ("golden.json", RESULTS_FILENAME)}
    kept = {"name": encoder.spec.name, "provenance": encoder.spec.provenance}
    spec = encoder.save_pretrained(folder, dtype="float16").model_copy(update=kept)
    (folder / CONFIG_FILENAME).write_text(json.dumps(spec.to_config()))
    (folder / ONNX_FILENAME).touch()
    for name, content in others.items():
        (folder / name).write_bytes(content)
    write_sums(folder)


def other_results(folder: Path) -> None:
    record = Record.read(folder / RESULTS_FILENAME)
    networks = tuple(n.model_copy(update={"sha256": "0" * 64}) for n in record.networks)
    record.model_copy(update={"networks": networks}).write(folder / RESULTS_FILENAME)
    write_sums(folder)


def other_graph(content: bytes) -> bytes:
    """The same model with one other weight."""
    graph = onnx.load_from_string(content)
    weight = max(graph.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    weight.raw_data = weight.raw_data[::-1]
    return graph.SerializeToString()


def other_origin(content: bytes) -> bytes:
    """The same graph, but its metadata say that other data trained it."""
    return content.replace(b'"dataset": "fashion-mnist"', b'"dataset": "another-mnist"')


CHANGES = {
    "altered weights": (
        edited("model.safetensors", lambda b: b[:-1] + b"?", listed=False),
        IntegrityError,
        "SHA256SUMS lists",
    ),
    "weights that config.json does not record": (
        edited("model.safetensors", lambda b: b + b"?", listed=True),
        IntegrityError,
        "22421089 bytes, expected 22421088",
    ),
    "weights that the registry does not record": (
        other_weights,
        IntegrityError,
        "differs from the registry's entry",
    ),
    "altered card": (
        edited("README.md", lambda b: b + b"better\n", listed=True),
        IntegrityError,
        "is not the card of its config.json and results.json",
    ),
    "altered results": (
        edited("results.json", lambda b: b.replace(b'"mean": 8', b'"mean": 9'), listed=True),
        IntegrityError,
        "is not the card",
    ),
    "results of other weights": (other_results, IntegrityError, "is of another network"),
    "a card that is no text": (
        edited("README.md", lambda b: b"\xff\xfe", listed=True),
        IntegrityError,
        "is not the card",
    ),
    "results on other data": (
        edited("results.json", lambda b: b.replace(b"fashion-mnist", b"imagenet100"), listed=True),
        SpecError,
        "can describe the data set .imagenet100.",
    ),
    "altered golden values": (
        edited("golden.json", lambda b: b.replace(b"1", b"2"), listed=False),
        IntegrityError,
        "SHA256SUMS lists",
    ),
    "altered golden values that are listed": (
        edited("golden.json", lambda b: b.replace(b"1", b"2"), listed=True),
        IntegrityError,
        "golden.json differs from .*, which is released",
    ),
    "altered figure": (
        edited("figures/drift.svg", lambda b: b"<svg/>", listed=True),
        IntegrityError,
        "drift.svg differs from",
    ),
    "no graph": (
        edited("onnx/model.onnx", lambda b: b"junk", listed=True),
        IntegrityError,
        "cannot be loaded by ONNX Runtime",
    ),
    "graph of other weights": (
        edited("onnx/model.onnx", other_graph, listed=True),
        IntegrityError,
        "embeddings differ by",
    ),
    "graph of another model": (
        edited("onnx/model.onnx", other_origin, listed=True),
        IntegrityError,
        "was made from another model",
    ),
    "missing file": (lambda f: (f / "onnx/model.onnx").unlink(), DataError, "missing: onnx/model"),
    "surplus file": (lambda f: (f / "notes.txt").touch(), DataError, "surplus: notes.txt"),
    "surplus file that is listed": (
        lambda f: ((f / "notes.txt").touch(), write_sums(f)),
        DataError,
        "surplus: notes.txt",
    ),
    "missing file that is not listed": (
        lambda f: ((f / "golden.json").unlink(), write_sums(f)),
        DataError,
        "missing: golden.json",
    ),
    "no digests": (lambda f: (f / SUMS_FILENAME).unlink(), DataError, "publish build"),
    "no list of digests": (
        edited(SUMS_FILENAME, lambda b: b"nothing\n", listed=False),
        IntegrityError,
        "no list of digests",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_that_does_not_fit_is_refused_before_any_request(
    copy: Path, change: str, monkeypatch
) -> None:
    apply, kind, words = CHANGES[change]
    apply(copy)
    monkeypatch.setattr(publish, "upload_folder", None)
    monkeypatch.setattr(publish, "plan_upload", None)
    with pytest.raises(kind, match=words):
        publish.push(copy, REPO)
    if change == "missing file":
        with pytest.raises(kind, match=words):
            publish.plan_push(copy, REPO)


def test_a_dry_run_says_what_would_change_and_changes_nothing(
    built: Path, hub: StandIn, tmp_path: Path
) -> None:
    old = read_tree(built) | {".gitattributes": b"", "pytorch_model.bin": b"old"}
    hub.add(REPO, old | {"README.md": b"old", "model.safetensors": b"old"})
    push = ("push", str(built), "--repo")
    absent, said, pushed, again, asked = commands(
        hub,
        tmp_path,
        (*push, "org/absent", "--dry-run"),
        (*push, REPO, "--dry-run"),
        (*push, REPO),
        (*push, REPO),
        (*push, "org/private", "--private", "--pr"),
    )
    assert "org/absent does not exist" in absent
    assert absent.count("added") == len(read_tree(built))
    assert set(hub.repos) == {REPO, "org/private"}
    new = {"README.md", "model.safetensors"}
    assert {tuple(line.split()) for line in said.splitlines()} == {
        *(("changed", name) for name in new),
        ("removed", "pytorch_model.bin"),
        *(("unchanged", name) for name in read_tree(built) if name not in new),
    }
    # The push did just that, in one commit, and another one found nothing to do.
    assert pushed.startswith(said)
    assert "changed" not in again.replace("unchanged", "")
    assert len(hub.repos[REPO].commits) == 2
    tree = hub.repos[REPO].commits[hub.repos[REPO].refs["main"]]
    assert tree == read_tree(built) | {".gitattributes": b""}
    assert len(hub.lines("POST /api/repos/create")) == 3
    assert len(hub.lines("POST .*/commit/main")) == 2
    assert hub.repos["org/private"].private
    assert f"{hub.url}/org/private/discussions/1" in asked
    assert "HubPin" not in asked


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with a large file, as the Hub calls it."""
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "README.md").write_bytes(b"card")
    write_sums(folder)
    return folder


def upload(folder: Path, hub: StandIn, home: Path, *lines: str) -> list[str]:
    """What `attempt(repo_id, ...)` says, several times in one process with the real client."""
    code = f"""
import time
from pathlib import Path
from clever_zoo.errors import CleverZooError
from clever_zoo.upload import upload_folder
time.sleep = lambda seconds: None
def attempt(repo_id, token={TOKEN!r}, **options):
    try:
        done = upload_folder(Path({str(folder)!r}), repo_id, message="m", token=token, **options)
        print(done.url)
    except CleverZooError as error:
        print(type(error).__name__, ' '.join(str(error).split()))
"""
    return run_client(code + "\n".join(lines), hub, home).splitlines()


def test_private_repositories_pull_requests_and_what_is_refused(
    small: Path, hub: StandIn, tmp_path: Path
) -> None:
    for repo_id in ("org/public", "org/race"):
        hub.add(repo_id, {"README.md": b"old"})
    before, answer = dict(hub.repos["org/public"].refs), hub.answer

    def push_meanwhile(request: Request) -> Answer:
        if re.search("org/race/preupload", request.line):
            hub.add("org/race", {"README.md": b"of somebody else", "more.txt": b""})
        return answer(request)

    hub.answer = push_meanwhile
    _, public, asked, token, branch, name, race = upload(
        small,
        hub,
        tmp_path,
        "attempt('org/private', private=True)",
        "attempt('org/public', private=True)",
        "attempt('org/public', create_pr=True)",
        "attempt('org/public', token='hf_no')",
        "attempt('org/public', revision='next')",
        "attempt('org/no good')",
        "attempt('org/race')",
    )
    assert hub.repos["org/private"].private
    assert public == ("UploadError org/public is public already; make it private there first")
    assert asked == f"{hub.url}/org/public/discussions/1"
    review = hub.repos["org/public"].refs.pop("refs/pr/1")
    assert hub.repos["org/public"].commits[review] == read_tree(small)
    assert hub.repos["org/public"].refs == before
    assert token.startswith("UploadError no file of org/public was changed")
    assert "hf auth login" in token
    assert "no such branch, tag or commit" in branch
    assert name.startswith("SourceError")
    assert "somebody else pushed meanwhile" in race
    tree = hub.repos["org/race"].commits[hub.repos["org/race"].refs["main"]]
    assert tree == {"README.md": b"of somebody else", "more.txt": b""}


STAGES = {
    "preupload": "POST /api/models/{}/preupload/main",
    "batch": "POST /{}.git/info/lfs/objects/batch",
    "put": "PUT /{}/",
    "commit": "POST /api/models/{}/commit/main",
}
REASONS = {
    401: "this token may not do that",
    404: "it does not exist, or this token",
    429: "limits the number of requests",
    500: "failed with status 500",
    "cut": "check the connection",
}


def test_a_push_that_fails_leaves_the_repository_as_it_was(
    small: Path, hub: StandIn, tmp_path: Path
) -> None:
    repos = {f"org/{stage}-{kind}": kind for stage in STAGES for kind in REASONS}
    for repo_id, kind in repos.items():
        hub.add(repo_id, {"README.md": b"old"})
        pattern = STAGES[repo_id[4:].partition("-")[0]].format(repo_id)
        hub.faults.append(Fault(kind, pattern, times=99))
    before = {name: dict(repo.refs) for name, repo in hub.repos.items()}
    attempts = [f"attempt({repo_id!r})" for repo_id in repos]
    said = upload(small, hub, tmp_path, *attempts)
    for line, fault, (repo_id, kind) in zip(said, hub.faults, repos.items(), strict=True):
        assert fault.times < 99, repo_id
        assert line.startswith(f"UploadError no file of {repo_id} was changed")
        assert REASONS[kind] in line
    # Of the one whose commit was cut, only the answer was lost.
    landed = hub.repos["org/commit-cut"].refs
    assert {n: r.refs for n, r in hub.repos.items()} == before | {"org/commit-cut": dict(landed)}
    assert landed != before["org/commit-cut"]
    # Once the faults are over, the same pushes succeed, or find nothing to do.
    hub.faults.clear()
    assert "Error" not in "".join(upload(small, hub, tmp_path, *attempts))
    for repo in hub.repos.values():
        assert len(repo.commits) == 2
        assert repo.commits[repo.refs["main"]] == read_tree(small)


def test_push_to_hub_keeps_what_is_its_owners(hub: StandIn, tmp_path: Path) -> None:
    derived = ("onnx/model.onnx", "results.json", "golden.json", "heads.safetensors")
    kept = {"README.md": b"by hand", "mine.txt": b"kept"}
    hub.add("org/mine", kept | dict.fromkeys(derived, b"old"))
    code = f"""
from clever_zoo.upload import PushToHub
class Model(PushToHub):
    _loader = "clever_zoo.load"
    def save_pretrained(self, folder, *, dtype="float32"):
        (folder / "config.json").write_text(dtype)
print(Model().push_to_hub("org/mine", token={TOKEN!r}))
print(Model().push_to_hub("org/mine", token={TOKEN!r}, create_pr=True, dtype="float16"))
Model().push_to_hub(
    "org/new", token={TOKEN!r}, private=True, commit_message="First", dtype="float16"
)
"""
    url, pull_request = run_client(code, hub, tmp_path).splitlines()
    mine, new = hub.repos["org/mine"], hub.repos["org/new"]
    assert url == f"{hub.url}/org/mine/commit/{mine.refs['main']}"
    assert pull_request == f"{hub.url}/org/mine/discussions/1"
    tree = mine.commits[mine.refs["main"]]
    assert tree == kept | {"config.json": b"float32", SUMS_FILENAME: tree[SUMS_FILENAME]}
    assert tree[SUMS_FILENAME].split()[1:] == [b"config.json"]
    assert new.private
    tree = new.commits[new.refs["main"]]
    assert b"library_name: clever-zoo" in tree["README.md"]
    assert b'clever_zoo.load("org/new")' in tree["README.md"]
    assert tree["config.json"] == b"float16"


@pytest.mark.slow
def test_any_encoder_or_classifier_is_pushed_to_the_hub(hub: StandIn, tmp_path: Path) -> None:
    code = f"""
import clever_zoo, torch
pixels = torch.rand(2, 3, 32, 32)
encoder = clever_zoo.create_encoder("vit_tiny", img_size=32, patch_size=8).eval()
encoder.push_to_hub("org/encoder", token={TOKEN!r})
loaded = clever_zoo.from_pretrained("org/encoder")
assert torch.equal(loaded(pixels).full, encoder(pixels).full)
classifier = clever_zoo.create_classifier(encoder, 3, part="invariant").eval()
classifier.push_to_hub("org/classifier", token={TOKEN!r}, private=True)
loaded = clever_zoo.Classifier.from_pretrained("org/classifier", token={TOKEN!r})
assert torch.equal(loaded(pixels), classifier(pixels))
"""
    run_client(code, hub, tmp_path)
    for name, loader in (("encoder", "from_pretrained"), ("classifier", "Classifier.from_pret")):
        repo = hub.repos[f"org/{name}"]
        card = repo.commits[repo.refs["main"]]["README.md"]
        assert f"clever_zoo.{loader}".encode() in card


def test_the_pin_of_a_build_is_that_of_its_digests(built: Path) -> None:
    weights = clever_zoo.model_info(NAME).weights
    assert read_sums(built / SUMS_FILENAME)["model.safetensors"] == weights.sha256
    assert Record.read(built / "results.json").model == NAME


def test_the_lines_for_the_maintainer_are_real_commands() -> None:
    text = (CARDS.parent / "RELEASING.md").read_text()
    lines = re.findall(r"^clever-zoo .*?(?=  |$)", text, re.MULTILINE)
    assert len(lines) == 4
    for line in lines:
        words = shlex.split(line)[1:]
        commands = words[: 2 if words[0] == "publish" else 1]
        said = CliRunner().invoke(app, [*commands, "--help"], env={"COLUMNS": "200"})
        assert said.exit_code == 0, line
        for option in re.findall(r"--?[a-z][a-z-]*\b(?= |$)", " ".join(words[len(commands) :])):
            assert f"{option} " in said.output, line
    assert "HUB_PINS: dict[str, HubPin]" in text

"""Publishing: the folder that goes up, what is refused, and the way to the Hub and back."""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import clever_zoo
from clever_zoo import publish
from clever_zoo.cli import app
from clever_zoo.errors import (
    DataError,
    IntegrityError,
    SourceError,
    UnknownModelError,
)
from clever_zoo.files import SUMS_FILENAME, read_sums, write_sums
from clever_zoo.records import RESULTS_FILENAME, Record
from clever_zoo.samples import sample_paths
from tests.hub_server import (
    TOKEN,
    Fault,
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
    return folder


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "copy"))


def commands(hub: StandIn, home: Path, *lines: tuple[str, ...]) -> list[str]:
    """What `clever-zoo publish ...` says, several times in one process with the real client."""
    home.mkdir(exist_ok=True)
    code = f"""
import json
from typer.testing import CliRunner
from clever_zoo.cli import app
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
    assert publish.check_built(built) == clever_zoo.model_info(NAME)


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
    for source, target, kind, words in (
        ("clever-resnet19", "new", UnknownModelError, "clever-resnet18"),
        ("org/model", "new", SourceError, "on the Hub already"),
        (f"local-dir:{partial}", "new", DataError, "lacks golden.json"),
        (f"local-dir:{other}", "new", IntegrityError, "golden.json: embeddings differ"),
        (NAME, "full", DataError, "is not empty"),
    ):
        with pytest.raises(kind, match=words):
            publish.build(source, tmp_path / target)
    assert not (tmp_path / "new").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]


def edited(name: str, edit: Callable[[bytes], bytes], *, listed: bool) -> Callable[[Path], None]:
    """A change of one file, with or without its digest brought up to date."""

    def change(folder: Path) -> None:
        (folder / name).write_bytes(edit((folder / name).read_bytes()))
        if listed:
            write_sums(folder)

    return change


def other_weights(folder: Path) -> None:
    """A consistent encoder that is not the one the registry has under this name."""
    encoder = clever_zoo.from_pretrained(folder)
    next(encoder.backbone.parameters()).data.mul_(2)
    encoder.save_pretrained(folder, dtype="float16")
    write_sums(folder)


def other_results(folder: Path) -> None:
    record = Record.read(folder / RESULTS_FILENAME)
    networks = tuple(n.model_copy(update={"sha256": "0" * 64}) for n in record.networks)
    record.model_copy(update={"networks": networks}).write(folder / RESULTS_FILENAME)
    write_sums(folder)


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
    "altered golden values": (
        edited("golden.json", lambda b: b.replace(b"1", b"2"), listed=False),
        IntegrityError,
        "SHA256SUMS lists",
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
        lambda f: (f / SUMS_FILENAME).write_text("nothing\n"),
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
    for send in (publish.push, publish.plan_push):
        with pytest.raises(kind, match=words):
            send(copy, REPO)


def test_a_dry_run_says_what_would_change_and_changes_nothing(
    built: Path, hub: StandIn, tmp_path: Path
) -> None:
    push = ("push", str(built), "--repo", REPO)
    (said,) = commands(hub, tmp_path, (*push, "--dry-run"))
    assert f"{REPO} does not exist" in said
    assert said.count("added") == len(read_tree(built))
    assert hub.repos == {}
    assert {request.method for request in hub.requests} == {"GET"}
    old = read_tree(built) | {".gitattributes": b"", "pytorch_model.bin": b"old"}
    hub.add(REPO, old | {"README.md": b"old", "model.safetensors": b"old"})
    hub.requests.clear()
    said, pushed, again = commands(hub, tmp_path, (*push, "--dry-run"), push, push)
    new = {"README.md", "model.safetensors"}
    assert {tuple(line.split()) for line in said.splitlines()} == {
        *(("changed", name) for name in new),
        ("removed", "pytorch_model.bin"),
        *(("unchanged", name) for name in read_tree(built) if name not in new),
    }
    writes = [request.line for request in hub.requests if request.method != "GET"]
    assert writes[0] == "POST /api/repos/create"
    # The push did just that, in one commit, and another one found nothing to do.
    assert pushed.startswith(said)
    assert "changed" not in again.replace("unchanged", "")
    assert len(hub.repos[REPO].commits) == 2
    tree = hub.repos[REPO].commits[hub.repos[REPO].refs["main"]]
    assert tree == read_tree(built) | {".gitattributes": b""}


def test_private_repositories_and_pull_requests(built: Path, hub: StandIn, tmp_path: Path) -> None:
    push = ("push", str(built), "--repo")
    before = {"main": hub.add("org/public", {"README.md": b"old"})}
    _, refused, asked = commands(
        hub,
        tmp_path,
        (*push, "org/private", "--private"),
        (*push, "org/public", "--private"),
        (*push, "org/public", "--pr"),
    )
    assert hub.repos["org/private"].private
    assert "UploadError: org/public is public already" in refused
    assert f"{hub.url}/org/public/discussions/1" in asked
    assert "HubPin" not in asked
    review = hub.repos["org/public"].refs.pop("refs/pr/1")
    assert hub.repos["org/public"].commits[review] == read_tree(built)
    assert hub.repos["org/public"].refs == before


def test_a_push_that_fails_leaves_the_repository_as_it_was(
    built: Path, hub: StandIn, tmp_path: Path
) -> None:
    for name in ("token", "branch", "put", "batch", "commit"):
        hub.add(f"org/{name}", {"README.md": b"old"})
    before = {name: dict(repo.refs) for name, repo in hub.repos.items()}
    code = f"""
from clever_zoo import publish
from clever_zoo.cli import app
def attempt(repo_id, token={TOKEN!r}, **options):
    try:
        publish.push({str(built)!r}, repo_id, token=token, **options)
    except publish.clever_zoo.CleverZooError as error:
        print(type(error).__name__, ' '.join(str(error).split()))
attempt("org/token", token="hf_no")
attempt("org/branch", revision="next")
attempt("org/no good")
attempt("org/put")
attempt("org/batch")
attempt("org/commit")
"""
    hub.faults = [
        Fault(403, "PUT /org/put/", times=99),
        Fault(403, "POST /org/batch.git/info/lfs/objects/batch", times=99),
        Fault(403, "POST /api/models/org/commit/commit/main", times=99),
    ]
    token, branch, name, *refused = run_client(code, hub, tmp_path).splitlines()
    assert token.startswith("UploadError org/token was not changed")
    assert "hf auth login" in token
    assert "no such branch, tag or commit" in branch
    assert name.startswith("SourceError")
    for line in refused:
        assert line.startswith("UploadError")
        assert "was not changed: it does not exist, or this token may not do that" in line
    assert {name: repo.refs for name, repo in hub.repos.items()} == before
    assert all(fault.times < 99 for fault in hub.faults)


def test_push_to_hub(hub: StandIn, tmp_path: Path) -> None:
    """Any encoder or classifier, by huggingface_hub's conventions."""
    hub.add("org/encoder", {"onnx/model.onnx": b"old", "results.json": b"old", "mine.txt": b"kept"})
    code = f"""
import clever_zoo, torch
pixels = torch.rand(2, 3, 32, 32)
encoder = clever_zoo.create_encoder("vit_tiny", img_size=32, patch_size=8).eval()
print(encoder.push_to_hub("org/encoder", token={TOKEN!r}))
loaded = clever_zoo.from_pretrained("org/encoder")
assert torch.equal(loaded(pixels).full, encoder(pixels).full)
classifier = clever_zoo.create_classifier(encoder, 3, part="invariant").eval()
url = classifier.push_to_hub(
    "org/classifier", token={TOKEN!r}, private=True, commit_message="First", dtype="float16"
)
loaded = clever_zoo.Classifier.from_pretrained("org/classifier", token={TOKEN!r})
assert loaded.spec.num_classes == 3
print(encoder.push_to_hub("org/encoder", token={TOKEN!r}, create_pr=True))
"""
    url, pull_request = run_client(code, hub, tmp_path).splitlines()
    repo = hub.repos["org/encoder"]
    assert url == f"{hub.url}/org/encoder/commit/{repo.refs['main']}"
    tree = repo.commits[repo.refs["main"]]
    assert set(tree) == {"README.md", "config.json", "model.safetensors", "SHA256SUMS", "mine.txt"}
    assert b'clever_zoo.from_pretrained("org/encoder")' in tree["README.md"]
    assert b"library_name: clever-zoo" in tree["README.md"]
    assert hub.repos["org/classifier"].private
    card = hub.repos["org/classifier"].commits[hub.repos["org/classifier"].refs["main"]]
    assert b'clever_zoo.Classifier.from_pretrained("org/classifier")' in card["README.md"]
    assert pull_request


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

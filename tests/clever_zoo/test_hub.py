"""Loading from the Hub: the real client in a process of its own, a stand-in at the other end.

Three groups are named after open issues of fastembed on the same ground: 88 (an interrupted
download), 615 (no network) and 642 (a damaged cache).
"""

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from clever_zoo import registry
from clever_zoo.onnx_encoder import OnnxEncoder
from clever_zoo.onnx_graph import OnnxGraph
from clever_zoo.registry import HubPin, model_info
from clever_zoo.spec import WeightFile
from tests.hub_server import (
    TOKEN,
    Fault,
    StandIn,
    Tree,
    read_tree,
    run_client,
    running_hub,
    start_client,
)
from tests.onnx_models import pictures

REPO = "org/model"
CONFIG, SUMS, WEIGHTS, ONNX = "config.json", "SHA256SUMS", "model.safetensors", "onnx/model.onnx"
CDN = f"GET /{REPO}/[0-9a-f]{{64}}"  # a large file, after its redirect
NO_PAUSES = "import time; time.sleep = lambda seconds: None\n"
CATCH = """
import os
from pathlib import Path
import clever_zoo
from clever_zoo.hub import HubOptions
from clever_zoo.locate import locate_model, locate_onnx

def attempt(source, locate=locate_model, **options):
    try:
        print(locate(source, HubOptions(**options))[1])
    except clever_zoo.CleverZooError as error:
        print(type(error).__name__, ' '.join(str(error).split()))

def truncate(path):
    os.truncate(path, path.stat().st_size // 2)

def alter(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 4] ^= 4
    path.write_bytes(content)

def empty(path):
    os.truncate(path, 0)
"""
LOAD = CATCH + f"attempt({REPO!r})"


def files_of(weights: bytes) -> Tree:
    """A repository whose files fit together; nothing reads what its large files hold."""
    spec = model_info("clever-resnet18").model_copy(update={"weights": WeightFile.of(weights)})
    tree = {
        CONFIG: json.dumps(spec.to_config()).encode(),
        WEIGHTS: weights,
        ONNX: weights[::-1],
    }
    lines = [f"{hashlib.sha256(tree[name]).hexdigest()}  {name}\n" for name in sorted(tree)]
    return tree | {SUMS: "".join(lines).encode()}


@pytest.fixture
def hub() -> Iterator[StandIn]:
    with running_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def model() -> Tree:
    return files_of(os.urandom(300_000))


@pytest.fixture
def repo(hub: StandIn, model: Tree) -> Tree:
    hub.add(REPO, model)
    return model


def place(hub: StandIn, home: Path, name: str) -> Path:
    """Where a file will be cached."""
    return home / "hub/models--org--model/snapshots" / hub.repos[REPO].refs["main"] / name


def cached(home: Path, name: str, repo_id: str = REPO) -> Path:
    """The one cached file of that name, in whatever snapshot."""
    folder = home / "hub" / f"models--{repo_id.replace('/', '--')}"
    (path,) = folder.glob(f"snapshots/*/{name}")
    return path


def assert_whole(home: Path, model: Tree, *names: str, repo_id: str = REPO) -> None:
    for name in names or (CONFIG, SUMS, WEIGHTS):
        assert cached(home, name, repo_id).read_bytes() == model[name], name
    assert list((home / "hub").rglob("*.incomplete")) == []


def test_every_form_of_a_source(hub: StandIn, model: Tree, tmp_path: Path) -> None:
    first = hub.add(REPO, model)
    hub.repos[REPO].refs |= {"v1": first, "refs/pr/1": first}
    hub.add(REPO, model | {"more.txt": b"2"})
    code = f"""
attempt("{REPO}")
attempt("hf-hub:{REPO}")
attempt("hf-hub:{REPO}@v1")
attempt("{REPO}", revision="{first}")
attempt("{REPO}", revision="refs/pr/1")
attempt("{REPO}", revision="v2")
attempt("{REPO}.git", revision="v2")
"""
    *paths, no_revision, no_name = run_client(CATCH + code, hub, tmp_path).splitlines()
    commits = [Path(path).parent.name for path in paths]
    assert commits == [hub.repos[REPO].refs["main"]] * 2 + [first] * 3
    assert no_revision.startswith("DownloadError config.json of 'org/model' at v2 could not")
    assert "no such branch, tag or commit" in no_revision
    assert no_name.startswith("SourceError")


def test_a_load_asks_once_for_the_branch_and_then_for_its_commit(
    hub: StandIn, repo: Tree, tmp_path: Path
) -> None:
    run_client(LOAD + f"\nattempt({REPO!r})", hub, tmp_path)
    commit = hub.repos[REPO].refs["main"]
    heads = [line.split("/resolve/")[1] for line in hub.lines("HEAD")]
    first = [f"main/{CONFIG}", f"{commit}/{SUMS}", f"{commit}/{WEIGHTS}"]
    assert heads == [*first, f"main/{CONFIG}"]
    assert len(hub.lines("GET .*resolve|" + CDN)) == 3


def test_a_load_is_never_a_mix_of_two_commits(hub: StandIn, model: Tree, tmp_path: Path) -> None:
    """A push lands between the first file of a load and the others."""
    first, answer = hub.add(REPO, model), hub.answer

    def push_meanwhile(request):
        if request.line.endswith(SUMS) and len(hub.repos[REPO].commits) == 1:
            hub.add(REPO, dict.fromkeys(model, b"{}"))
        return answer(request)

    hub.answer = push_meanwhile
    path = Path(run_client(LOAD, hub, tmp_path))
    assert len(hub.repos[REPO].commits) == 2
    assert path.parent.name == first
    assert path.read_bytes() == model[WEIGHTS]


def test_onnx_from_the_hub_runs_without_torch(
    hub: StandIn, onnx_models: Path, tmp_path: Path
) -> None:
    graph = onnx_models / "vit.onnx"
    config = OnnxGraph.open(graph).spec.to_config() | {"auto_map": {"AutoModel": "model.Model"}}
    tree = {CONFIG: json.dumps(config).encode(), ONNX: graph.read_bytes()}
    sums = [f"{hashlib.sha256(content).hexdigest()}  {name}" for name, content in tree.items()]
    names = ("__init__.py", "model.py", "numpy.py", "onnx/__init__.py", "sitecustomize.py")
    hub.add(REPO, tree | {SUMS: "\n".join(sums).encode()} | dict.fromkeys(names, b"1 / 0"))
    code = f"""
import sys, numpy as np
from clever_zoo import OnnxEncoder
from clever_zoo.runtimes import load_encoder
encoder = load_encoder({REPO!r}, threads=1)
assert type(encoder) is OnnxEncoder
np.savez("embedding.npz", **encoder.embed({[str(p) for p in pictures()]})._asdict())
assert not {{"torch", "timm"}} & set(sys.modules)
"""
    run_client(code, hub, tmp_path)
    assert cached(tmp_path, ONNX).read_bytes() == tree[ONNX]
    assert hub.lines(r"\.py") == []  # nothing of a repository is run
    expected = OnnxEncoder.from_pretrained(graph, threads=1).embed(pictures())
    with np.load(tmp_path / "embedding.npz") as content:
        for name, half in expected._asdict().items():
            np.testing.assert_array_equal(content[name], half)


def test_passing_faults_are_overcome_within_the_call(
    hub: StandIn, model: Tree, tmp_path: Path
) -> None:
    faults = {
        f"org/{phase}-{kind}": Fault(kind, pattern, headers={"Retry-After": "0"})
        for phase, kinds, pattern in (
            ("head", (429, 500, 503), "HEAD /{}/.*safetensors"),
            ("get", ("cut", "reset", "corrupt", 429, 500, 503), "GET /{}/[0-9a-f]{{64}}"),
        )
        for kind in kinds
    }
    for repo_id, fault in faults.items():
        hub.add(repo_id, model)
        fault.pattern = fault.pattern.format(repo_id)
        hub.faults.append(fault)
    loads = "\n".join(f"attempt({repo_id!r})" for repo_id in faults)
    # Xet was not exercised; what its client raises comes through as this.
    hub.add("org/xet", model)
    broken = """
import huggingface_hub
real = huggingface_hub.hf_hub_download
def breaking(*arguments, times, **options):
    if times:
        times.pop()
        raise RuntimeError("Data processing error: CAS service error")
    return real(*arguments, **options)
for times in (1, 99):
    breaks = functools.partial(breaking, times=[None] * times)
    huggingface_hub.hf_hub_download = breaks
    attempt("org/xet")
"""
    code = "import functools\n" + NO_PAUSES + CATCH + loads + broken
    *said, overcome, lasting = run_client(code, hub, tmp_path).splitlines()
    assert Path(overcome) == cached(tmp_path, WEIGHTS, "org/xet")
    assert lasting.startswith("DownloadError config.json of 'org/xet'")
    assert "CAS service error" in lasting
    for path, (repo_id, fault) in zip(said, faults.items(), strict=True):
        assert fault.times == 0, repo_id
        assert Path(path) == cached(tmp_path, WEIGHTS, repo_id)
        assert_whole(tmp_path, model, repo_id=repo_id)


@pytest.mark.parametrize("kind", ["cut", "stall"])
def test_a_large_transfer_goes_on_where_it_broke_off(
    hub: StandIn, tmp_path: Path, kind: str
) -> None:
    large = files_of(os.urandom(24 << 20))  # the client writes down ten megabytes at a time
    hub.add(REPO, large)
    hub.faults.append(Fault(kind, CDN))
    run_client(NO_PAUSES + LOAD, hub, tmp_path, HF_HUB_DOWNLOAD_TIMEOUT="2")
    assert_whole(tmp_path, large)
    ranges = [r.headers.get("range") for r in hub.requests if re.search(CDN, r.line)]
    assert ranges == [None, f"bytes={10 << 20}-"]


LASTING = {
    401: "log in with `hf auth login`",
    403: "this token may not do that",
    404: "it does not exist, or",
    429: "limits the number of requests",
    500: "failed with status 500",
}


@pytest.mark.parametrize("pattern", ["HEAD /{}/.*safetensors", "GET /{}/[0-9a-f]{{64}}"])
def test_a_lasting_fault_is_one_error_that_says_what_to_do(
    hub: StandIn, model: Tree, tmp_path: Path, pattern: str
) -> None:
    repos = {f"org/model-{status}": (status, words) for status, words in LASTING.items()}
    for repo_id, (status, _) in repos.items():
        hub.add(repo_id, model)
        hub.faults.append(Fault(status, pattern.format(repo_id), times=99))
    loads = "\n".join(f"attempt({repo_id!r})" for repo_id in repos)
    said = run_client(NO_PAUSES + CATCH + loads, hub, tmp_path).splitlines()
    for line, (repo_id, (_, words)) in zip(said, repos.items(), strict=True):
        assert line.startswith(f"DownloadError {WEIGHTS} of {repo_id!r} at ")
        assert words in line
    # Nothing half is left, and once the faults are over the same loads succeed.
    assert list((tmp_path / "hub").glob(f"models--*/snapshots/*/{WEIGHTS}")) == []
    hub.faults.clear()
    run_client(CATCH + loads, hub, tmp_path)
    for repo_id in repos:
        assert_whole(tmp_path, model, repo_id=repo_id)


def test_a_cached_model_outlives_the_hub(hub: StandIn, repo: Tree, tmp_path: Path) -> None:
    path = run_client(LOAD, hub, tmp_path)
    hub.faults = [Fault(status, "HEAD") for status in (401, 429, 500)]
    thrice = LOAD + f"\nattempt({REPO!r})" * 2
    assert run_client(thrice, hub, tmp_path).splitlines() == [path] * 3
    assert [fault.times for fault in hub.faults] == [0] * 3
    assert run_client(LOAD, hub, tmp_path, HF_ENDPOINT="http://127.0.0.1:9") == path


def test_what_is_wrong_at_the_source_is_fetched_twice_and_refused(
    hub: StandIn, model: Tree, tmp_path: Path
) -> None:
    hub.add(REPO, model | {WEIGHTS: model[ONNX]})
    said = run_client(LOAD, hub, tmp_path)
    assert said.startswith("IntegrityError")
    assert "it was fetched again and is no better" in said
    assert len(hub.lines(CDN)) == 2


# fastembed 642: a damaged cache is found, and fetched again once.


@pytest.mark.parametrize("name", [CONFIG, SUMS, WEIGHTS, ONNX])
def test_642_a_damaged_cached_file_is_fetched_again_once(
    hub: StandIn, repo: Tree, tmp_path: Path, name: str
) -> None:
    locate, large = ("locate_onnx", ONNX) if name == ONNX else ("locate_model", WEIGHTS)
    load = f"attempt({REPO!r}, locate={locate})\n"
    path = str(place(hub, tmp_path, name))
    code = "".join(f"{how}(Path({path!r}))\n{load}" for how in ("truncate", "alter", "empty"))
    assert "Error" not in run_client(CATCH + load + code + load, hub, tmp_path)
    assert_whole(tmp_path, repo, CONFIG, SUMS, large)
    assert len(hub.lines(CDN)) == 1 + 3
    assert len(hub.lines(f"GET .*/{CONFIG}")) == 1 + 3


def test_642_without_a_list_of_digests_too(hub: StandIn, model: Tree, tmp_path: Path) -> None:
    """The names of the cached files are digests."""
    hub.add(REPO, {k: v for k, v in model.items() if k != SUMS})
    load = f"attempt({REPO!r}); attempt({REPO!r}, locate=locate_onnx)\n"
    code = "".join(
        f"{how}(Path({str(place(hub, tmp_path, name))!r}))\n{load}"
        for name in (CONFIG, WEIGHTS, ONNX)
        for how in ("truncate", "alter")
    )
    assert "Error" not in run_client(CATCH + load + load + code, hub, tmp_path)
    assert_whole(tmp_path, model, CONFIG, WEIGHTS, ONNX)
    assert len(hub.lines(SUMS)) == 1 + 6  # that there is none is remembered until a repair


# fastembed 615: with local_files_only or HF_HUB_OFFLINE the cache serves, and nothing is asked.


@pytest.mark.parametrize("way", ["local_files_only", "HF_HUB_OFFLINE"])
def test_615_offline_the_cache_is_enough(
    hub: StandIn, repo: Tree, tmp_path: Path, way: str
) -> None:
    argument, variables = (
        (", local_files_only=True", {}) if way == "local_files_only" else ("", {way: "1"})
    )
    code = f"attempt({REPO!r}{argument})\nattempt({REPO!r}{argument}, locate=locate_onnx)"
    for said in run_client(CATCH + code, hub, tmp_path, **variables).splitlines():
        assert said.startswith(
            f"DownloadError {CONFIG} of {REPO!r} at main is not in the Hub cache"
        )
        assert "connect and load it once" in said
    assert hub.lines() == []
    path = run_client(LOAD, hub, tmp_path)
    hub.requests.clear()
    damage = f"\ntruncate(Path({str(cached(tmp_path, WEIGHTS))!r}))\n"
    said = run_client(CATCH + code + damage + code, hub, tmp_path, **variables).splitlines()
    assert said[0] == path
    assert said[1].startswith(f"DownloadError {ONNX} of {REPO!r}")
    assert said[2].startswith("IntegrityError")
    assert said[2].endswith("so connect and load it once")
    assert hub.lines() == []


# fastembed 88: an interrupted download leaves a cache that the next start can use.


def test_88_a_killed_process_leaves_nothing_half(hub: StandIn, repo: Tree, tmp_path: Path) -> None:
    fault = Fault("stall", CDN)
    hub.faults.append(fault)
    with start_client(LOAD, hub, tmp_path) as process:
        assert fault.stalled.wait(60)
        process.kill()
    fault.released.set()
    assert list((tmp_path / "hub").glob(f"models--*/snapshots/*/{WEIGHTS}")) == []
    assert Path(run_client(LOAD, hub, tmp_path)).read_bytes() == repo[WEIGHTS]


def test_88_a_second_process_does_not_wait_for_a_dead_one(
    hub: StandIn, repo: Tree, tmp_path: Path
) -> None:
    fault = Fault("stall", CDN)
    hub.faults.append(fault)
    with start_client(LOAD, hub, tmp_path) as dead:
        assert fault.stalled.wait(60)
        with start_client(LOAD, hub, tmp_path) as second:
            deadline_s = time.monotonic() + 60
            while not hub.lines(f"HEAD .*{WEIGHTS}")[1:]:
                assert second.poll() is None
                assert time.monotonic() < deadline_s
                time.sleep(0.05)
            dead.kill()
            out, err = second.communicate(timeout=60)
    assert second.returncode == 0, err
    assert Path(out.strip()).read_bytes() == repo[WEIGHTS]


def test_eight_processes_at_once_share_one_consistent_cache(
    hub: StandIn, repo: Tree, tmp_path: Path
) -> None:
    processes = [start_client(LOAD, hub, tmp_path) for _ in range(8)]
    results = [(*process.communicate(timeout=120), process.returncode) for process in processes]
    assert [code for *_, code in results] == [0] * 8, results
    assert {out.strip() for out, *_ in results} == {str(cached(tmp_path, WEIGHTS))}
    assert_whole(tmp_path, repo)
    assert len(list((tmp_path / "hub/models--org--model/blobs").iterdir())) == 3
    # And find it damaged together.
    os.truncate(cached(tmp_path, WEIGHTS), 1000)
    assert repaired(LOAD, hub, tmp_path) == {out.strip() for out, *_ in results}
    assert_whole(tmp_path, repo)


def repaired(code: str, hub: StandIn, home: Path) -> set[str]:
    """What three processes at once say."""
    processes = [start_client(code, hub, home) for _ in range(3)]
    return {process.communicate(timeout=120)[0].strip() for process in processes}


# The cache directory itself.


def test_a_full_cache_is_named_and_stays_intact(hub: StandIn, repo: Tree, tmp_path: Path) -> None:
    """The system refuses to write more than the small files need."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    said = run_client(limit + LOAD, hub, tmp_path)
    assert said.startswith(f"DownloadError {WEIGHTS} of {REPO!r}")
    assert "free space or permit writing, or name another folder with HF_HOME" in said
    for name in (CONFIG, SUMS):
        assert cached(tmp_path, name).read_bytes() == repo[name]
    run_client(LOAD, hub, tmp_path)
    assert_whole(tmp_path, repo)


def test_a_read_only_cache_serves_and_is_named_where_it_cannot(hub: StandIn, repo: Tree) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        path = run_client(LOAD, hub, home)
        folders = [home, *(folder for folder in home.rglob("*") if folder.is_dir())]
        for folder in folders:
            folder.chmod(0o555)
        # Permissions do not hold root back; once it steps down, it may not import more.
        load = f"attempt({REPO!r})\n"
        drop = "if os.getuid() == 0: os.setuid(65534)\n"
        code = CATCH + load + drop + load + f"attempt({REPO!r}, locate=locate_onnx)"
        said = run_client(code, hub, home).splitlines()
        for folder in folders:
            folder.chmod(0o755)
        assert said[:2] == [path] * 2
        assert said[2].startswith(f"DownloadError {ONNX} of {REPO!r}")
        assert "could not be written to the Hub cache" in said[2]
        assert "HF_HOME or cache_dir" in said[2]
        assert_whole(home, repo)


def test_a_cache_without_symbolic_links(hub: StandIn, repo: Tree, tmp_path: Path) -> None:
    """As on FAT or on Windows; the cache itself is reached through a link."""
    refuse = """
import os
def refuse(*arguments, **options): raise OSError(1, "Operation not permitted")
os.symlink = refuse
"""
    (tmp_path / "disk").mkdir()
    home = tmp_path / "home"
    home.symlink_to(tmp_path / "disk")
    path = place(hub, home, WEIGHTS)
    hub.add("org/unlisted", {k: v for k, v in repo.items() if k != SUMS})
    hub.faults.append(Fault(500, f"(HEAD|GET) /{REPO}/", times=0))
    repair = f"truncate(Path({str(path)!r}))\nattempt({REPO!r})\n"
    code = f"""
{NO_PAUSES}
attempt("org/unlisted")
attempt("org/unlisted", locate=locate_onnx)
{repair}
"""
    first, unlisted, graph, again = run_client(refuse + LOAD + code, hub, home).splitlines()
    assert [Path(line).resolve() for line in (first, again)] == [path.resolve()] * 2
    assert not path.is_symlink()
    assert_whole(home, repo)
    assert unlisted.endswith(WEIGHTS)
    assert graph.startswith("IntegrityError")
    assert "cannot be checked: 'org/unlisted' at " in graph
    # A repair that fails takes nothing away.
    hub.faults[0].times = 99
    assert run_client(refuse + NO_PAUSES + CATCH + repair, hub, home).startswith("DownloadError")
    assert path.stat().st_size == len(repo[WEIGHTS]) // 2
    for name in (CONFIG, SUMS):
        assert cached(home, name).read_bytes() == repo[name]
    # Processes that repair it at once do not disturb one another.
    hub.faults.clear()
    assert {Path(said).resolve() for said in repaired(refuse + LOAD, hub, home)} == {path.resolve()}
    assert_whole(home, repo)
    assert {p.name for p in path.parents[2].iterdir()} == {"blobs", "refs", "snapshots"}


# What is no model.


def test_a_repository_that_is_no_model(hub: StandIn, model: Tree, tmp_path: Path) -> None:
    without = {name: {k: v for k, v in model.items() if k not in (name, SUMS)} for name in model}
    hub.add("org/no-weights", without[WEIGHTS])
    hub.add("org/no-config", without[CONFIG])
    hub.add("org/no-graph", without[ONNX])
    hub.add("org/foreign", {CONFIG: b'{"architecture": "resnet18"}', WEIGHTS: model[WEIGHTS]})
    hub.add("org/unlisted", model | {SUMS: b"0" * 64 + b"  README.md\n"})
    code = """
attempt("org/no-weights")
attempt("org/no-config")
attempt("org/no-graph", locate=locate_onnx)
attempt("org/foreign")
attempt("org/unlisted")
attempt("org/absent")
"""
    said = run_client(CATCH + code, hub, tmp_path).splitlines()
    assert said[0].startswith("DownloadError 'org/no-weights' at ")
    assert "has no model.safetensors, so it is no complete model" in said[0]
    assert "has no config.json" in said[1]
    assert "has no onnx/model.onnx" in said[2]
    assert "clever-zoo export org/no-graph -o model.onnx" in said[2]
    assert said[3].startswith("SpecError")
    assert "has no 'clever' section" in said[3]
    assert said[4].startswith("IntegrityError config.json is not listed in SHA256SUMS")
    assert said[5].startswith("DownloadError")
    assert "it does not exist, or this token may not" in said[5]


# Tokens, the endpoint and the proxy are huggingface_hub's own.


def test_tokens_reach_the_hub_and_nobody_else(hub: StandIn, model: Tree, tmp_path: Path) -> None:
    hub.add(REPO, model, private=True)
    said = run_client(CATCH + f"attempt({REPO!r}); attempt({REPO!r}, token='hf_no')", hub, tmp_path)
    for line in said.splitlines():
        assert line.startswith("DownloadError")
        assert "hf auth login" in line
    given = CATCH + f"attempt({REPO!r}, token={TOKEN!r}, cache_dir='{tmp_path}/elsewhere')"
    assert run_client(given, hub, tmp_path).startswith(f"{tmp_path}/elsewhere/models--")
    run_client(LOAD, hub, tmp_path / "variable", HF_TOKEN=TOKEN)
    (tmp_path / "file").mkdir()
    (tmp_path / "file/token").write_text(TOKEN)
    run_client(LOAD, hub, tmp_path / "file")
    for home in ("variable", "file"):
        assert_whole(tmp_path / home, model)
    assert {r.token for r in hub.requests if r.at == "cdn"} == {None}
    assert TOKEN in {r.token for r in hub.requests if r.at == "hub"}
    agents = {r.headers["user-agent"] for r in hub.requests if "resolve" in r.path}
    assert all(agent.startswith("clever-zoo/") for agent in agents)


def test_a_proxy_is_used(hub: StandIn, repo: Tree, tmp_path: Path) -> None:
    """The endpoint's name cannot be resolved here; only the proxy knows it."""
    run_client(LOAD, hub, tmp_path, HF_ENDPOINT="http://hub.invalid", HTTP_PROXY=hub.url)
    assert_whole(tmp_path, repo)


# Registered names.


@pytest.fixture
def released() -> Tree:
    """The packed files of the released model."""
    tree = read_tree(Path(__file__).parents[2] / "model_cards/clever-resnet18.fmnist")
    return {name: tree[name] for name in (CONFIG, WEIGHTS)}


NOT_PACKED = "from clever_zoo import locate\nlocate._MODEL_FOLDERS = (locate._PACKAGE / 'no',)\n"


def pinned(repo_id: str, commit: str) -> str:
    """Code that pins the released model."""
    return CATCH + (
        "from clever_zoo.registry import HUB_PINS, HubPin\n"
        f"HUB_PINS['clever-resnet18.fmnist'] = HubPin({repo_id!r}, {commit!r})\n"
    )


def test_a_released_name_is_packed_or_cached_or_at_the_pinned_commit(
    hub: StandIn, released: Tree, onnx_models: Path, tmp_path: Path
) -> None:
    graph = (onnx_models / "resnet18.onnx").read_bytes()
    commit = hub.add(REPO, released | {ONNX: graph})
    hub.add(REPO, dict.fromkeys(released, b"of a later push"))
    load = "attempt('clever-resnet18')\n"
    assert "model_cards" in run_client(pinned(REPO, commit) + load, hub, tmp_path)
    assert hub.lines() == []
    where = tmp_path / f"hub/models--org--model/snapshots/{commit}" / WEIGHTS
    damage = f"truncate(Path({str(where)!r}))\n"
    code = pinned(REPO, commit) + NOT_PACKED + load + load + damage + load
    assert run_client(code, hub, tmp_path).splitlines() == [str(where)] * 3
    assert where.read_bytes() == released[WEIGHTS]
    assert len(hub.lines(CDN)) == len(hub.lines("HEAD")) == 2  # the first, and the repair
    # If what is packed is damaged, that commit has it, too.
    packed = tmp_path / "packed/clever-resnet18.fmnist"
    packed.mkdir(parents=True)
    for name, content in released.items():
        (packed / name).write_bytes(content[:-1])
    code = f"locate._MODEL_FOLDERS = (Path({str(packed.parent)!r}),)\n"
    assert run_client(pinned(REPO, commit) + NOT_PACKED + code + load, hub, tmp_path) == str(where)
    # The ONNX file is not packed: it comes from the same commit, if it is asked for.
    code = """
from clever_zoo.runtimes import choose_runtime
print(choose_runtime("clever-resnet18", "auto"))
attempt("clever-resnet18", locate=locate_onnx)
print(clever_zoo.OnnxEncoder.from_pretrained("clever-resnet18").spec.name)
"""
    runtime, config, spec_name = run_client(pinned(REPO, commit) + code, hub, tmp_path).splitlines()
    assert runtime == "torch"
    assert "model_cards" in config
    assert spec_name == "clever-resnet18.fmnist"
    assert cached(tmp_path, ONNX).read_bytes() == graph


def test_a_pinned_repository_with_other_weights_is_refused(
    hub: StandIn, model: Tree, tmp_path: Path
) -> None:
    code = pinned(REPO, hub.add(REPO, model)) + NOT_PACKED + "attempt('clever-resnet18')"
    said = run_client(code, hub, tmp_path)
    assert said.startswith("IntegrityError")
    assert str(model_info("clever-resnet18").weights.size_bytes) in said


def test_without_a_pin_the_network_is_never_asked(hub: StandIn, tmp_path: Path) -> None:
    unpinned = "clever_zoo.registry.HUB_PINS.clear()\nattempt('clever-resnet18')"
    said = run_client(CATCH + NOT_PACKED + unpinned, hub, tmp_path)
    assert said.startswith("DownloadError")
    assert "not on the Hub yet; reinstall clever-zoo" in said
    assert hub.lines() == []


def test_pins_are_whole_commits_of_released_models() -> None:
    for name, pin in registry.HUB_PINS.items():
        assert isinstance(pin, HubPin)
        assert model_info(name).name == name
        assert len(pin.commit) == 40

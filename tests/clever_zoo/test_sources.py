"""What a text that names a model means, and what is refused."""

import functools
from pathlib import Path

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clever_zoo.errors import SettingError, SourceError
from clever_zoo.locate import locate_model
from clever_zoo.registry import list_models, model_info
from clever_zoo.sources import HubSource, LocalSource, ReleasedSource, parse_source
from clever_zoo.upload import plan_upload

STRANGE = "aZ09-_./:@#?%\\ ~\u0435\u0445é\u2011\uff0f\u202e\x00\n\x7f"
EVIL = st.text(st.sampled_from(STRANGE) | st.characters(), max_size=40)
SCHEMES = st.sampled_from(["", "hf-hub:", "local-dir:", "hf-hub:org/repo@", "C:", "org/"])


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("clever-resnet18/..", r"'\.\.'"),
        ("../clever-resnet18", r"'\.\.'"),
        ("org/..", r"'\.\.'"),
        ("hf-hub:../repo", r"'\.\.'"),
        ("hf-hub:org/repo@../../main", r"'\.\.'"),
        ("clever-resnet18#main", "'#'"),
        ("org/repo?download=true", r"'\?'"),
        ("org/repo%2e%2e", "'%'"),
        ("C:\\models\\resnet", "drive letter"),
        ("c:/models/resnet", "drive letter"),
        ("D:", "drive letter"),
        ("clever-resnet18/", "ends in a slash"),
        ("org/repo/", "path|slash"),
        ("hf-hub:org/repo/", "ends in a slash"),
        ("clever\u2011resnet18", r"U\+2011 NON-BREAKING HYPHEN"),
        ("\u0441lever-resnet18", r"U\+0441 CYRILLIC SMALL LETTER ES"),
        ("org\uff0frepo", r"U\+FF0F FULLWIDTH SOLIDUS"),
        ("hf-hub:\u043erg/repo", r"U\+043E CYRILLIC"),
        ("org/repo\u202e", r"U\+202E RIGHT-TO-LEFT OVERRIDE"),
        ("hf-hub:org/repo@v\uff11", r"U\+FF11 FULLWIDTH DIGIT ONE"),
        ("clever-resnet18\n", "control character"),
        ("local-dir:a\x00b", "control character"),
        ("clever resnet18", "' '"),
        ("x" * 97, "up to 96"),
        ("x" * 10_000, "10000 characters, at most 193"),
        ("org/" + "x" * 97, "up to 96"),
        ("hf-hub:org/repo@" + "x" * 300, "300 characters, at most 255"),
        ("local-dir:" + "x/" * 3000, "6000 bytes, at most 4095"),
        ("local-dir:" + "é/" * 1400, "4200 bytes, at most 4095"),
        ("local-dir:\ud800", "cannot be written in utf-8"),
        ("local-dir:" + "é" * 200, "more than 255 bytes"),
        ("hf-hub:org/a--b", "'--'"),
        ("hf-hub:org/repo.git", r"'\.git'"),
        ("hf-hub:org/.repo", "beginning or end"),
        ("hf-hub:org/repo-", "beginning or end"),
        ("hf-hub:repo", "org/repo"),
        ("hf-hub:a/b/c", "org/repo"),
        ("s3:bucket", "no scheme"),
        ("/abs/model", "looks like a path"),
        ("~/model", "looks like a path"),
    ],
)
def test_what_is_refused_and_why(source: str, problem: str) -> None:
    with pytest.raises(SourceError, match=problem) as caught:
        parse_source(source)
    message = str(caught.value)
    assert message.isprintable()
    assert any(part in message for part in ("hf-hub:", "local-dir:", "path of a model folder"))
    assert len(message) < 500


def test_a_name_that_is_a_folder_too_has_two_readings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, other in (
        ("clever-resnet18", "released model"),
        ("clever-resnet18.fmnist", "released model"),
        ("my-model", "released model"),
        ("org/repo", "Hub repository"),
    ):
        parse_source(name)
        (tmp_path / name).mkdir(parents=True)
        with pytest.raises(SourceError, match=f"{other} or the local folder.*'local-dir:{name}'"):
            parse_source(name)
        assert parse_source(f"local-dir:{name}") == LocalSource(Path(name))
    (tmp_path / "clever-resnet50").touch()  # a file is no model folder
    assert parse_source("clever-resnet50") == ReleasedSource("clever-resnet50")


def test_paths_are_measured_in_bytes_and_before_they_are_used() -> None:
    longest = Path("é/" * 1365)  # 4094 bytes
    assert parse_source(longest) == LocalSource(longest)
    with pytest.raises(SourceError, match="is no folder"):
        locate_model(longest)
    with pytest.raises(SourceError, match="cannot be written"):
        parse_source(Path("\ud800"))


def test_folders_may_have_any_name_that_the_system_allows() -> None:
    for path in ("../modèles/ü", "a#b?", "C:\\models", "models/", "~/x"):
        assert parse_source(f"local-dir:{path}") == LocalSource(Path(path))
        assert parse_source(Path(path)) == LocalSource(Path(path))
    with pytest.raises(SourceError, match="control character"):
        parse_source(Path("a\x00b"))


def test_revisions() -> None:
    for revision in ("main", "v1.0", "refs/pr/3", "a" * 40, "feature+x@y=z"):
        assert parse_source(f"hf-hub:org/repo@{revision}") == HubSource("org/repo", revision)
        assert parse_source("hf-hub:org/repo", revision) == HubSource("org/repo", revision)
    for revision in ("", "/main", "main/", "a//b", "-x", "a b", "a~1", "a^", "a:b", "a\\b"):
        with pytest.raises(SourceError, match="no valid revision"):
            parse_source("hf-hub:org/repo", revision)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from([*"aB0-_./é\n", "--", ".git", "/"]), max_size=12).map("".join))
@example("a" * 96 + "/" + "b" * 96)
@example("a/" + "b" * 97)
def test_the_hub_takes_exactly_the_repositories_that_are_taken_here(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
        valid = "/" in repo_id
    except HFValidationError:
        valid = False
    try:
        parsed = parse_source(f"hf-hub:{repo_id}")
    except SourceError:
        assert not valid
    else:
        assert valid
        assert parsed == HubSource(repo_id, None)


@settings(max_examples=500, deadline=None)
@given(SCHEMES, EVIL, st.none() | EVIL)
def test_any_text_is_a_source_or_a_source_error(
    scheme: str, text: str, revision: str | None
) -> None:
    try:
        parsed = parse_source(scheme + text, revision)
    except SourceError:
        return
    if isinstance(parsed, LocalSource):
        assert (scheme + text).startswith("local-dir:")
        assert "\x00" not in str(parsed.folder)
        return
    for part in parsed:
        assert part is None or (part.isascii() and part.isprintable() and part)
        assert part is None or not {"..", ""} & set(part.split("/"))
        assert part is None or not set(part) & set("#?%\\ ~:")
    if isinstance(parsed, ReleasedSource):
        assert "/" not in parsed.name
    else:
        validate_repo_id(parsed.repo_id)


def test_released_names_are_sources() -> None:
    for name in list_models():
        assert parse_source(name) == ReleasedSource(name)
        assert model_info(name).name == name


@pytest.mark.parametrize("reach", [locate_model, functools.partial(plan_upload, Path())])
def test_an_endpoint_that_is_no_url_is_named(reach, monkeypatch: pytest.MonkeyPatch) -> None:
    """With it huggingface_hub cannot be imported."""
    monkeypatch.setenv("HF_ENDPOINT", "http://[::1")
    with pytest.raises(SettingError, match=r"HF_ENDPOINT is 'http://\[::1', which is no URL"):
        reach("org/repo")

"""config.json: whatever its content, a spec or an error of ours."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clever_zoo.errors import SpecError
from clever_zoo.registry import RELEASED
from clever_zoo.spec import CLASSIFIER_KEY, MAX_JSON_BYTES, ClassifierSpec, ModelSpec, parse_json

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["resnet18", "vit_tiny", "full", "0" * 64, 224, 1, 10**400]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


def config() -> dict[str, Any]:
    """A valid one, freshly made."""
    return json.loads(json.dumps(RELEASED[0].to_config()))


def classifier_config() -> dict[str, Any]:
    return ClassifierSpec(encoder=RELEASED[0], num_classes=3).to_config()


def places(value: Any, prefix: tuple = ()) -> list[tuple]:
    """The paths of all values inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [
        place
        for key, inner in items
        for place in [
            (*prefix, key),
            *(places(inner, (*prefix, key)) if isinstance(inner, dict | list) else ()),
        ]
    ]


@st.composite
def changed(draw: st.DrawFn, whole: dict[str, Any]) -> dict[str, Any]:
    """A config with some value in our sections replaced, removed or added."""
    whole = json.loads(json.dumps(whole))
    ours = [p for p in places(whole) if p[0] in ("clever", CLASSIFIER_KEY)]
    *way, last = draw(st.sampled_from(ours))
    parent = whole
    for key in way:
        parent = parent[key]
    action = draw(st.sampled_from(["replace", "remove", "add"]))
    if action == "remove":
        del parent[last]
    elif action == "replace" or isinstance(parent, list):
        parent[last] = draw(JSON)
    else:
        parent[draw(st.text(max_size=8))] = draw(JSON)
    return whole


@settings(max_examples=300, deadline=None)
@given(changed(config()))
def test_a_changed_config_is_a_spec_that_says_so_or_a_spec_error(content: dict[str, Any]) -> None:
    try:
        spec = ModelSpec.from_config(content, "test")
    except SpecError:
        return
    # Nothing was made up and nothing overlooked: the spec is what the section says.
    section = json.loads(json.dumps(content["clever"]))
    assert section.pop("schema_version") == 1
    assert json.loads(spec.model_dump_json()) == section
    assert 1 <= spec.preprocess.input_size_px <= spec.preprocess.resize_px < 500_000
    assert all(map(math.isfinite, spec.preprocess.mean + spec.preprocess.std))


@settings(max_examples=200, deadline=None)
@given(changed(classifier_config()))
def test_a_changed_classifier_config_is_a_spec_or_a_spec_error(content: dict[str, Any]) -> None:
    try:
        spec = ClassifierSpec.from_config(content, "test")
    except SpecError:
        return
    assert spec.to_config()[CLASSIFIER_KEY] == content[CLASSIFIER_KEY]


@settings(max_examples=200, deadline=None)
@given(JSON)
def test_any_json_is_refused_as_a_config(content: Any) -> None:
    with pytest.raises(SpecError):
        ModelSpec.from_config(content, "test")
    with pytest.raises(SpecError):
        ModelSpec.from_config({"clever": content}, "test")
    with pytest.raises(SpecError):
        ClassifierSpec.from_config(config() | {CLASSIFIER_KEY: content}, "test")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64), st.integers(0, 1200), st.booleans())
def test_any_bytes_are_a_spec_error(noise: bytes, place: int, insert: bool) -> None:
    content = json.dumps(config()).encode()
    content = content[:place] + noise + content[place + (0 if insert else len(noise)) :]
    try:
        spec = ModelSpec.from_config(parse_json(content, "test"), "test")
    except SpecError:
        return
    assert json.loads(spec.model_dump_json()).items() <= json.loads(content)["clever"].items()


@pytest.mark.parametrize("depth", [100, 900, 5_000, 100_000])
@pytest.mark.parametrize("where", ["whole", "model_args"])
def test_deep_nesting_is_a_spec_error(tmp_path: Path, depth: int, where: str) -> None:
    deep = "[" * depth + "]" * depth
    text = deep
    if where == "model_args":
        text = json.dumps(config()).replace('"model_args": {}', f'"model_args": {{"x": {deep}}}')
        assert deep in text
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SpecError):
        ModelSpec.read(tmp_path / "config.json")


def test_large_and_strange_files_are_spec_errors(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config()) + " " * MAX_JSON_BYTES)
    with pytest.raises(SpecError, match="larger than"):
        ModelSpec.read(path)
    for content in (b"", b"\xff\xfe{\x00", b"9" * 5000, b"\xef\xbb\xbf{}", b'{"clever": NaN}'):
        path.write_bytes(content)
        with pytest.raises(SpecError):
            ModelSpec.read(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(SpecError, match="cannot be read"):
        ModelSpec.read(path)


@pytest.mark.parametrize(
    ("version", "advice"),
    [
        (2, "upgrade clever-zoo"),
        (10**30, "upgrade clever-zoo"),
        (0, "save_pretrained"),
        (None, "save_pretrained"),
        ("1", "save_pretrained"),
        (1.0, "save_pretrained"),
        (True, "save_pretrained"),
    ],
)
def test_other_versions_of_the_schema(version: Any, advice: str) -> None:
    for content, read in ((config(), ModelSpec), (classifier_config(), ClassifierSpec)):
        content["clever"]["schema_version"] = version
        with pytest.raises(SpecError, match=advice):
            read.from_config(content, "test")


@pytest.mark.parametrize(
    ("section", "value", "problem"),
    [
        ("weights", {"filename": "../../model.safetensors"}, "weights.filename"),
        ("weights", {"filename": "/etc/model.safetensors"}, "weights.filename"),
        ("weights", {"filename": "a/model.safetensors"}, "weights.filename"),
        ("weights", {"filename": "a\\model.safetensors"}, "weights.filename"),
        ("weights", {"filename": ".safetensors"}, "weights.filename"),
        ("weights", {"filename": "model.safetensors\n"}, "weights.filename"),
        ("weights", {"filename": "model.bin"}, "weights.filename"),
        ("weights", {"filename": "m\u043edel.safetensors"}, "weights.filename"),
        ("preprocess", {"input_size_px": 10**9}, "input_size_px"),
        ("preprocess", {"crop_pct": 1e-300}, "crop_pct"),
        (None, {"name": "../../x"}, "name"),
        (None, {"name": "a/b"}, "name"),
        (None, {"name": ""}, "name"),
        (None, {"name": "x" * 1000}, "name"),
        (None, {"model_args": {"img_size": 64}}, "not an argument of resnet18"),
    ],
)
def test_values_that_could_do_harm_are_refused(section, value, problem: str) -> None:
    content = config()
    target = content["clever"] if section is None else content["clever"][section]
    target.update(value)
    with pytest.raises(SpecError, match=problem):
        ModelSpec.from_config(content, "test")


@pytest.mark.parametrize(
    ("model_args", "size", "problem"),
    [
        ({"img_size": 10**6}, 224, "use 1 to 1024"),
        ({"patch_size": 10**6}, 224, "use 1 to 64"),
        ({"img_size": 40}, 224, "img_size is 40, which patches of 16 pixels do not divide"),
        ({"patch_size": 9}, 224, "input_size_px is 224, which patches of 9"),
        ({}, 225, "input_size_px is 225, which patches of 16"),
    ],
)
def test_sizes_that_a_vit_cannot_have(model_args, size: int, problem: str) -> None:
    with pytest.raises(SpecError, match=problem):
        ModelSpec.create(
            name="x",
            backbone="vit_tiny",
            invariant_dim=1,
            preprocess={"input_size_px": size},
            model_args=model_args,
        )

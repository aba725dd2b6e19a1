"""Cards as the Hub reads them, and cards, registry and README in step."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

import clever_zoo
from clever_zoo.cards import CITATION, METRICS, render_card
from clever_zoo.errors import SpecError
from clever_zoo.records import PARTS, RESULTS_FILENAME, Record
from clever_zoo.registry import DEFAULT_TAGS
from clever_zoo.samples import sample_paths

ROOT = Path(__file__).parents[2]
CARDS = ROOT / "model_cards"
RELEASED = clever_zoo.list_models()
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", RELEASED)
def test_the_hub_sees_licence_library_tags_data_and_metrics(name: str) -> None:
    spec, record = clever_zoo.model_info(name), Record.read(CARDS / name / RESULTS_FILENAME)
    data = ModelCard.load(CARDS / name / "README.md").data
    assert data.license == spec.provenance.license.lower() == "apache-2.0"
    assert data.library_name == "clever-zoo"
    assert data.pipeline_tag == "image-feature-extraction"
    assert {"timm", "transformers", "self-supervised"} <= set(data.tags)
    assert data.datasets == ["zalando-datasets/fashion_mnist"]
    assert data.metrics == ["accuracy"]
    assert data.model_name == name
    shown = {result.metric_name: result.metric_value for result in data.eval_results}
    measured = {
        f"{metric.label}, {part}": round(row.mean, 2)
        for metric in METRICS[:5]
        for part in PARTS
        if (
            row := record.find(
                name, metric.task, metric.metric, part,
                perturbation=metric.perturbation, at=metric.at,
            )
        )
    }  # fmt: skip
    assert shown == measured
    assert {f"k-NN, {how} (%), {part}" for how in ("clean", "CJ+R") for part in PARTS} <= set(shown)
    assert {r.dataset_type for r in data.eval_results} == set(data.datasets)


@pytest.mark.parametrize("name", RELEASED)
def test_a_card_says_what_its_reader_needs(name: str) -> None:
    spec = clever_zoo.model_info(name)
    text = (CARDS / name / "README.md").read_text()
    sections = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert sections == [
        "Input",
        "Use and misuse",
        "Limits",
        "Data and training",
        "Compute and energy",
        "Results",
        "Files and digests",
        "Licence and citation",
    ]
    assert f"{spec.feature_dim} features" in text
    assert f"(1, {spec.invariant_dim}), (1, {spec.equivariant_dim})" in text
    assert f"{spec.weights.size_bytes:,} bytes" in text
    for fact in (spec.weights.sha256, spec.provenance.commit[:12], str(spec.preprocess.mean)):
        assert fact in text
    assert CITATION in text


def test_the_citation_is_that_of_the_software() -> None:
    (paper,) = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    fields = dict(re.findall(r"(\w+) = \{(.*?)\}", CITATION, re.DOTALL))
    assert fields["title"] == paper["title"]
    assert fields["year"] == str(paper["year"])
    assert fields["journal"].endswith(paper["identifiers"][0]["value"])
    names = [f"{a['family-names']}, {a['given-names']}" for a in paper["authors"]]
    assert re.split(r"\s+and\s+", fields["author"]) == names


def test_cards_registry_and_readme_name_the_same_models() -> None:
    assert {folder.name for folder in CARDS.iterdir() if folder.is_dir()} == set(RELEASED)
    assert set(re.findall(r"\(model_cards/([^/)]+)/README\.md\)", README)) == set(RELEASED)
    loaded = set(re.findall(r"from_pretrained\(\"(clever-[^\"]+)\"\)", README))
    assert loaded
    assert loaded <= {*RELEASED, *DEFAULT_TAGS}


def test_no_card_without_weights() -> None:
    record = Record.read(CARDS / RELEASED[0] / RESULTS_FILENAME)
    with pytest.raises(SpecError, match="'resnet18' has no weights"):
        render_card(clever_zoo.create_encoder("resnet18").spec, record)


def test_tables_need_no_hub_client() -> None:
    script = "import sys, clever_zoo.cards; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def load_section(language: str = "python") -> list[str]:
    section = README.split("\n## Load it\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def test_the_readme_shows_all_doors_in_ten_lines(tmp_path: Path, monkeypatch) -> None:
    for name in ("hubconf.py", "model_cards"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    doors, _ = load_section()
    assert len(doors.splitlines()) <= 10
    for name, path in zip(("shoe.png", "bag.png"), sample_paths(), strict=False):
        shutil.copy(path, name)
    names: dict[str, Any] = {}
    exec(doors, names)
    with torch.no_grad():
        expected = names["encoder"](names["pixels"])
    assert torch.equal(names["invariant"], expected.invariant)
    assert torch.equal(names["equivariant"], expected.equivariant)


def test_the_readme_shows_retrieval_in_fifteen_more(capsys) -> None:
    """And prints what the README says."""
    _, retrieval = load_section()
    assert len(retrieval.splitlines()) <= 15
    exec(retrieval, {})
    (shown,), found = load_section("text"), capsys.readouterr().out
    assert re.findall(r"\S+\.png", found) == re.findall(r"\S+\.png", shown)
    numbers = [np.array(re.findall(r"\d\.\d\d", text), float) for text in (found, shown)]
    np.testing.assert_allclose(*numbers, atol=0.011)

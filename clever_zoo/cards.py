"""Model cards and results tables, written from a model's spec and its results record."""

from typing import Any

from clever_zoo.spec import ModelSpec

Record = dict[str, Any]

PARTS = ("full", "invariant", "equivariant")
METRICS = {
    "clean": "k-NN, clean (%)",
    "r": "k-NN, rotated ±90° (%)",
    "cj_r": "k-NN, CJ+R (%)",
    "angle_r2": "angle R²",
}
DATASETS = {
    "fashion-mnist": (
        "Fashion-MNIST: 60,000 grey product photographs of 28x28 pixels in ten classes (MIT)",
        "small grey pictures of single objects on black, like its training data: retrieval and "
        "grouping that should survive rotation, tests, teaching, and as a worked example",
        "natural photographs, colour, scenes, text, faces, or anything larger than a thumbnail: "
        "28-pixel product photographs of ten classes are all it has ever seen",
    )
}


def metric_cell(column: Record, metric: str, part: str) -> str:
    """One value of a results record as text; empty if the column has no such part."""
    values = column["angle_r2"] if metric == "angle_r2" else column["knn"][metric]
    value = values.get(part)
    if value is None:
        return ""
    if isinstance(value, dict):
        return f"{value['mean']:.1f} ± {value['std']:.1f}"
    return f"{value:.2f}" if metric == "angle_r2" else f"{value:.1f}"


def results_table(record: Record) -> str:
    """A Markdown table of every metric and part, one column per network and control."""
    columns = record["columns"]
    lines = [
        f"| metric | part | {' | '.join(columns)} |",
        f"|---|---|{'---:|' * len(columns)}",
    ]
    for metric, label in METRICS.items():
        for part in PARTS:
            cells = [metric_cell(column, metric, part) for column in columns.values()]
            lines.append(f"| {label} | {part} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _findings(record: Record) -> list[str]:
    columns = record["columns"]
    lines = []
    for name, column in columns.items():
        if name != "pixels":
            angle = column["angle_r2"]
            lines.append(
                f"- `{name}`: the angle is read with R² {angle['invariant']:.2f} from the "
                f"invariant and {angle['equivariant']:.2f} from the equivariant half; k-NN under "
                f"rotation and jitter reaches {column['knn']['cj_r']['invariant']['mean']:.1f} % "
                f"and {column['knn']['cj_r']['equivariant']['mean']:.1f} %."
            )
    return lines


def _training_lines(columns: Record) -> list[str]:
    lines = []
    for name, column in columns.items():
        facts = column.get("training", {})
        if "recipe" in facts:
            lines.append(
                f"- `{name}`: recipe `training/recipes/{facts['recipe']}.toml`, seed "
                f"{facts['seed']}, {facts['epochs']} epochs = {facts['images_seen']:,} images in "
                f"{facts['seconds'] / 60:.0f} minutes ({facts['images_per_s']:.0f} images/s) on "
                f"{facts['hardware']}, torch {facts['torch']}, commit `{facts['commit'][:12]}`"
                f"{'; ' + facts['note'] if 'note' in facts else ''}."
            )
    return lines


def render_card(spec: ModelSpec, record: Record) -> str:
    """The text of a released model's README.md.

    Args:
        spec: Of the released weights, with provenance.
        record: Its results.json.
    """
    data, good_for, not_for = DATASETS[record["dataset"]]
    p = spec.preprocess
    evaluation = record["evaluation"]
    protocols = [f"- {name}: {text}." for name, text in record["protocols"].items()]
    size_mb = spec.weights.size_bytes / 1e6 if spec.weights else 0.0
    return f"""---
license: apache-2.0
library_name: clever-zoo
pipeline_tag: image-feature-extraction
tags: [clever-zoo, timm, self-supervised, equivariance, image-embeddings]
datasets: [zalando-datasets/fashion_mnist]
---
<!-- Written by `make tables` from config.json and results.json. -->
# {spec.name}

A {spec.backbone} whose {spec.feature_dim} features come in two labelled halves: the first
{spec.invariant_dim} are the *invariant* half (meant for what is in the picture), the other
{spec.equivariant_dim} the *equivariant* half (meant for how it was seen). What each half was
measured to hold stands under Results.

```python
import clever_zoo

encoder = clever_zoo.from_pretrained("{spec.name}")
embedding = encoder.embed(["picture.png"])
embedding.invariant, embedding.equivariant  # (1, {spec.invariant_dim}), (1, {spec.equivariant_dim})
```

timm and transformers load the same folder and return the full features; cut them at
{spec.invariant_dim}. Input: {p.input_size_px}x{p.input_size_px} RGB, short side resized to
{p.resize_px} (bicubic), centre crop, mean {p.mean}, std {p.std}.
Weights: {size_mb:.1f} MB, float16 storage with float32 norm layers, sha256
`{spec.weights.sha256 if spec.weights else ""}`.

## Good for, and not
- Good for: {good_for}.
- Not for: {not_for}.

## Results
Top-1 in percent of {record["images"]["test"]:,} test images; mean ± standard deviation over
{len(record["perturbation_seeds"])} perturbation seeds. One training seed, so differences of a
point or two between networks may be chance. The baseline's and the untrained network's
features are cut at the same index as a control.

{results_table(record)}

{chr(10).join(_findings(record))}

Protocols:
{chr(10).join(protocols)}

Evaluated on {evaluation["hardware"]}, torch {evaluation["torch"]}, commit
`{evaluation["commit"][:12]}`. The full record is results.json.

## Training
Data: {data}. Method: CLeVER (arXiv 2406.00262) on DINO with rotated views; the recipe states
what differs from the paper's.

{chr(10).join(_training_lines(record["columns"]))}

## Licence
Weights and code: Apache-2.0. Please cite the paper (CITATION.cff).
"""

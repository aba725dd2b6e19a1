"""Model cards, results tables and findings, written from a model's spec and its results record."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from clever_zoo.embedding import Part
from clever_zoo.errors import SpecError
from clever_zoo.hub import LIBRARY_NAME
from clever_zoo.records import PARTS, ROLES, Interpolation, Network, Record, Result, Role
from clever_zoo.registry import timm_name
from clever_zoo.spec import ModelSpec


class DatasetFacts(NamedTuple):
    """What cards say of a data set: its id and title on the Hub, what it is, what it teaches."""

    hub_id: str
    title: str
    description: str
    good_for: str
    not_for: str


DATASETS = {
    "fashion-mnist": DatasetFacts(
        hub_id="zalando-datasets/fashion_mnist",
        title="Fashion-MNIST",
        description="60,000 grey product photographs of 28x28 pixels in ten classes (MIT)",
        good_for="small grey pictures of single objects on black, like its training data: "
        "retrieval and grouping by the invariant half that should survive rotation by up to 90° "
        "either way, tests, teaching, and as a worked example",
        not_for="natural photographs, colour, scenes, text, faces, or anything larger than a "
        "thumbnail: 28-pixel product photographs of ten classes are all it has ever seen",
    )
}
# Name of a figure beside the card -> what its caption says.
FIGURES = {
    "perturbed": "Top-1 by perturbation of the test images and part, with the controls",
    "drift": "How far a rotation moves the features, relative to their length",
}

# By the first word of a metric's name; what is not here is a percentage or an angle.
_DECIMALS = {"r2": 2} | dict.fromkeys(("ratio", "j", "f", "max", "iou", "accuracy"), 3)
_CLASSIFYING = {
    "knn": "k-NN",
    "linear_cached": "linear probe",
    "linear_reference": "published probe",
}
_TASK_LABELS = _CLASSIFYING | {
    "rotation4": "quarter turns",
    "jitter": "colour jitter",
    "angle": "rotation angle",
    "frozen_short": "head alone, preset short",
    "finetune_short": "head and encoder, preset short",
}
_METRIC_LABELS = {
    "top1": "top-1 (%)",
    "top5": "top-5 (%)",
    "top1_last": "top-1 (%)",
    "top1_best": "top-1 (%) of the best epoch on the test images",
    "r2": "R²",
    "mae_deg": "mean error (°)",
}


CITATION = """@article{song2024clever,
  title = {Contrastive Learning Via Equivariant Representation},
  author = {Song, Sifan and Wang, Jinfeng and Zhao, Qiaochu and Li, Xiang and Wu, Dufan and
            Stefanidis, Angelos and Su, Jionglong and Zhou, S. Kevin and Li, Quanzheng},
  journal = {arXiv preprint arXiv:2406.00262},
  year = {2024},
}"""


class Metric(NamedTuple):
    """One row of a table: its label, and the key of its numbers but for network and part."""

    label: str
    task: str
    metric: str
    perturbation: str = "ori"
    at: float | None = None
    interpolation: Interpolation = "bicubic"
    features: str = "last1"


class Column(NamedTuple):
    """One column of a table: a network of a record."""

    heading: str
    record: Record
    network: str
    role: Role

    def find(self, metric: Metric, part: Part) -> Result | None:
        """Its number in a row, None if it was not measured."""
        return self.record.find(
            self.network,
            metric.task,
            metric.metric,
            part,
            perturbation=metric.perturbation,
            interpolation=metric.interpolation,
            features=metric.features,
            at=metric.at,
        )


METRICS = (
    Metric("k-NN, clean (%)", "knn", "top1", "ori", 20.0),
    Metric("k-NN, rotated ±90° (%)", "knn", "top1", "r", 20.0),
    Metric("k-NN, CJ+R (%)", "knn", "top1", "cj_r", 20.0),
    Metric("linear probe, clean (%)", "linear_cached", "top1_last"),
    Metric("linear probe, CJ+R (%)", "linear_cached", "top1_last", "cj_r"),
    Metric("angle R²", "angle", "r2"),
)
# How an image was seen, as far as it can be read from its features; more is better in each.
READINGS = (
    Metric("angle R²", "angle", "r2"),
    Metric("relative angle of two views R²", "relative_angle", "r2"),
    Metric("quarter turns (%, chance 25)", "rotation4", "top1"),
    Metric("crop: scale R²", "crop", "r2_scale"),
    Metric("crop: x R²", "crop", "r2_x"),
    Metric("crop: y R²", "crop", "r2_y"),
    Metric("flip (%, chance 50)", "flip", "top1"),
    Metric("jitter: brightness R²", "jitter", "r2_brightness"),
    Metric("jitter: contrast R²", "jitter", "r2_contrast"),
    Metric("jitter: saturation R²", "jitter", "r2_saturation"),
    Metric("jitter: hue R²", "jitter", "r2_hue"),
)
ERRORS = (
    Metric("angle, mean error (°)", "angle", "mae_deg"),
    Metric("relative angle, mean error (°)", "relative_angle", "mae_deg"),
)


def columns_of(record: Record) -> list[Column]:
    """The networks of a record, in the order of `ROLES`."""
    ordered = sorted(record.networks, key=lambda network: ROLES.index(network.role))
    return [Column(n.name, record, n.name, n.role) for n in ordered]


def columns_by_role(record: Record) -> dict[Role, Column]:
    """The networks of a record, which holds one of each role."""
    return {column.role: column for column in columns_of(record)}


def every_metric(record: Record) -> tuple[Metric, ...]:
    """A row for everything that the record holds, in its order, with a full label."""
    found: dict[Metric, None] = {}
    for row in record.results:
        p = row.protocol
        label = _label(record, row)
        key = (p.task, row.metric, p.perturbation, row.at, p.interpolation, p.features)
        found.setdefault(Metric(label, *key))
    return tuple(found)


def _label(record: Record, row: Result) -> str:
    p = row.protocol
    words = [_TASK_LABELS.get(p.task, p.task.replace("_", " "))]
    if p.features != "last1":
        words.append(p.features)
    if row.at is not None:
        words.append(f"k = {row.at:g}" if p.task == "knn" else f"at {row.at:g}")
    if p.task in _CLASSIFYING or p.perturbation != "ori":
        words.append(record.perturbations[p.perturbation].split(":")[0])
    if p.interpolation != "bicubic":
        words.append(p.interpolation)
    kind, _, of = row.metric.partition("_")
    known = _METRIC_LABELS.get(row.metric)
    words.append(known or f"{_METRIC_LABELS.get(kind, kind)} {of.replace('_', ' ')}".strip())
    return ", ".join(words)


def decimals_of(metric: str) -> int:
    """Decimals that a number of this metric is shown with."""
    return _DECIMALS.get(metric.partition("_")[0], 1)


def metric_cell(result: Result | None) -> str:
    """A number as text, with its deviation where several seeds stand behind it."""
    if result is None:
        return ""
    decimals = decimals_of(result.metric)
    text = f"{result.mean:z.{decimals}f}"
    return f"{text} ± {result.std:.{decimals}f}" if len(result.seeds) > 1 else text


def table_rows(columns: Sequence[Column], rows: Iterable[Metric]) -> list[list[str]]:
    """Cells of a table, the head first; rows without any value are left out."""
    cells = [["metric", "part", *(column.heading for column in columns)]]
    for metric in rows:
        for part in PARTS:
            values = [metric_cell(column.find(metric, part)) for column in columns]
            if any(values):
                cells.append([metric.label, part, *values])
    return cells


def markdown_table(cells: Sequence[Sequence[str]], *, texts: int = 2) -> str:
    """A Markdown table; the columns after the first `texts` are aligned to the right."""
    head, *body = cells
    rule = "|" + "---|" * texts + "---:|" * (len(head) - texts)
    return "\n".join([_line(head), rule, *(_line(row) for row in body)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def results_table(record: Record, rows: Iterable[Metric] = METRICS) -> str:
    """A Markdown table of metrics and parts, one column per network and control."""
    return markdown_table(table_rows(columns_of(record), rows))


_CUTS: dict[Role, str] = {
    "paper": "the same cut of the network with the paper's terms alone",
    "baseline": "the same cut of the baseline",
    "untrained": "that of the untrained network",
}


def findings(record: Record) -> list[str]:
    """What was measured of each half in sentences, whether or not it fits the half's name."""
    columns = columns_by_role(record)
    if "model" not in columns:
        return []
    classes = [metric for metric in METRICS if metric.task in _CLASSIFYING]
    under_cj_r = [metric for metric in classes if metric.perturbation == "cj_r"]
    sentences = [_sentence(columns, m, "invariant", "equivariant") for m in under_cj_r]
    sentences += [_sentence(columns, m, "equivariant", "invariant") for m in READINGS[:3]]
    sentences.append(_count(columns, classes, "invariant", "equivariant", "class accuracies"))
    topic = "readings of how a picture was seen"
    sentences.append(_count(columns, READINGS, "equivariant", "invariant", topic))
    return [sentence for sentence in sentences if sentence]


def _sentence(columns: Mapping[Role, Column], metric: Metric, half: Part, other: Part) -> str:
    """A number of both halves of the model, each beside the same cuts of the controls."""
    if not all(columns["model"].find(metric, part) for part in (half, other)):
        return ""
    clauses = []
    for part in (half, other):
        named: dict[Role, str] = {"model": f"the {part} half", **_CUTS}
        cuts = [
            f"{words} {metric_cell(found)}"
            for role, words in named.items()
            if role in columns and (found := columns[role].find(metric, part))
        ]
        clauses.append(", ".join(cuts))
    return f"{metric.label}: {'; '.join(clauses)}."


def _count(
    columns: Mapping[Role, Column], metrics: Sequence[Metric], half: Part, other: Part, topic: str
) -> str:
    """In how many numbers a half of the model is above its other half and the controls."""
    rivals = {f"the {other} half": (columns["model"], other)} | {
        words: (columns[role], half) for role, words in _CUTS.items() if role in columns
    }
    counts = []
    for words, (column, part) in rivals.items():
        pairs = [
            (own.mean, rival.mean)
            for metric in metrics
            if (own := columns["model"].find(metric, half)) and (rival := column.find(metric, part))
            if own.mean > 0 or rival.mean > 0  # below 0, R² only says that neither reads anything
        ]
        if pairs:
            counts.append(f"{words} in {sum(a > b for a, b in pairs)} of {len(pairs)}")
    return f"Of the {topic}, the {half} half is above {', '.join(counts)}." if counts else ""


def shortfalls(record: Record) -> list[str]:
    """In sentences, how a model's training was less than whole or even, or left it behind pixels.

    They do not keep a model from being released, but its card must say so.
    """
    found = []
    model, baseline = record.network("model"), record.network("baseline")
    for network in (model, baseline):
        if network and not network.training.get("finished", True):
            facts = network.training
            epochs = facts["images_seen"] / record.images["train"]
            found.append(
                f"`{network.name}` was stopped after {epochs:.1f} of its {facts['epochs']} epochs "
                f"({facts['steps']:,} steps)."
            )
    if model and baseline:
        seen, rival = (n.training.get("images_seen", 0) for n in (model, baseline))
        if 0 < seen < rival:
            more = rival / seen - 1
            found.append(f"The baseline saw {more:.1%} more images than the model.")
    clean, columns = METRICS[0], columns_by_role(record)
    if {"model", "pixels"} <= columns.keys():
        ours = columns["model"].find(clean, "invariant")
        theirs = columns["pixels"].find(clean, "full")
        if ours and theirs and ours.mean < theirs.mean:
            found.append(
                f"On clean pictures raw pixels are the better neighbours: {clean.label} "
                f"{metric_cell(theirs)}, the invariant half {metric_cell(ours)}."
            )
    return found


def card_figures(record: Record) -> dict[str, str]:
    """Name -> caption of the figures that the record has numbers for."""
    measured = {row.protocol.task for row in record.results}
    drawn = {"perturbed": {"knn", "linear_cached"}, "drift": {"drift"}}
    return {name: FIGURES[name] for name, tasks in drawn.items() if tasks & measured}


def _figures(record: Record) -> str:
    return "\n\n".join(
        f"![{caption}](figures/{name}.svg)" for name, caption in card_figures(record).items()
    )


def measured_lines(record: Record) -> list[str]:
    """Each environment with the tasks that were measured there."""
    lines = []
    for index, e in enumerate(record.environments):
        tasks = {row.protocol.task: None for row in record.results if row.environment == index}
        lines.append(
            f"- {', '.join(tasks)}: {e.hardware}, torch {e.torch}, Python {e.python}, commit "
            f"`{e.commit[:12]}`."
        )
    return lines


def _seeds(record: Record) -> str:
    seeds = sorted({seed for row in record.results if len(row.seeds) > 1 for seed in row.seeds})
    if not seeds:
        return ""
    return f" and, after ±, population standard deviation over seeds {', '.join(map(str, seeds))}"


def _training_line(network: Network) -> str:
    facts = network.training
    return (
        f"- `{network.name}`: recipe `training/recipes/{facts['recipe']}.toml` of "
        f"{facts['epochs']} epochs, seed {facts['seed']}, {facts['images_seen']:,} images in "
        f"{facts['seconds'] / 60:.0f} minutes ({facts['images_per_s']:.0f} images/s) on "
        f"{facts['hardware']}, torch {facts['torch']}, commit `{facts['commit'][:12]}`"
        f"{''.join(map(_continued, facts.get('continued_under', [])))}"
        f"{'; ' + facts['note'] if 'note' in facts else ''}."
    )


def _continued(later: Mapping[str, str]) -> str:
    return f", continued on {later['hardware']}, commit `{later['commit'][:12]}`"


def _digest_lines(record: Record) -> list[str]:
    return [f"- `{n.name}`: sha256 `{n.sha256}`." for n in record.networks if n.sha256]


def _definitions(definitions: Mapping[str, str]) -> list[str]:
    return [f"- `{name}`: {text}." for name, text in definitions.items()]


def _folded(summary: str, text: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"


def _results_section(spec: ModelSpec, record: Record) -> str:
    fine_tuned = [m for m in every_metric(record) if m.task.startswith(("finetune_", "frozen_"))]
    definitions = [*_definitions(record.tasks), *_definitions(record.perturbations)]
    paragraphs = [
        f"On {record.dataset}, {record.images['test']:,} test images; k-NN with k = 20 "
        f"unless it says otherwise; means{_seeds(record)}. The "
        f"features of all networks are cut at {record.invariant_dim}, those of the baseline and "
        "of the untrained network as controls; raw pixels are not cut.",
        results_table(record),
        _figures(record),
        "### What each half was measured to hold",
        "What can be read from each part of how an image was seen. The halves differ in width "
        f"({spec.invariant_dim} and {spec.equivariant_dim}), so compare first with the same cut "
        "of the controls.",
        results_table(record, (*READINGS, *ERRORS)),
        "\n".join(f"- {sentence}" for sentence in findings(record)),
        *(["### Fine-tuned", results_table(record, fine_tuned)] if fine_tuned else []),
        _folded("Every number of the record", results_table(record, every_metric(record))),
        "### Protocols",
        "\n".join(definitions),
        "### Where it was measured",
        "\n".join(measured_lines(record)),
        "The full record, with seeds, images and seconds of each number, is results.json.",
    ]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _dataset(record: Record) -> DatasetFacts:
    if record.dataset not in DATASETS:
        raise SpecError(
            f"no card can describe the data set {record.dataset!r}, only {', '.join(DATASETS)}; "
            "add its facts to DATASETS in clever_zoo/cards.py"
        )
    return DATASETS[record.dataset]


def _front_matter(licence: str, record: Record) -> str:
    """What the Hub reads of a card, with the class accuracies of the model."""
    from huggingface_hub import EvalResult, ModelCardData

    data = _dataset(record)
    model = Column(record.model, record, record.model, "model")
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=data.hub_id,
            dataset_name=data.title,
            dataset_split="test",
            metric_type="accuracy",
            metric_name=f"{metric.label}, {part}",
            metric_value=round(found.mean, 2),
        )
        for metric in METRICS
        for part in PARTS
        if metric.task in _CLASSIFYING and (found := model.find(metric, part))
    ]
    card = ModelCardData(
        license=licence.lower(),
        library_name=LIBRARY_NAME,
        pipeline_tag="image-feature-extraction",
        tags=["timm", "transformers", "self-supervised", "equivariance", "image-embeddings"],
        datasets=[data.hub_id],
        metrics=["accuracy"],
        model_name=record.model,
        eval_results=results,
    )
    return card.to_yaml()


def render_card(spec: ModelSpec, record: Record) -> str:
    """The text of a released model's README.md.

    Args:
        spec: Of the released weights, with provenance.
        record: Its results.json.

    Raises:
        SpecError: If `spec` has no weights or no provenance, or the data set is unknown.
    """
    if spec.weights is None or spec.provenance is None:
        raise SpecError(
            f"{spec.name!r} has no weights or no provenance; a card describes a released model, "
            "see training/release.py"
        )
    data, p, weights = _dataset(record), spec.preprocess, spec.weights
    licence = spec.provenance.license
    trained = [network for network in record.networks if "recipe" in network.training]
    hours = sum(network.training["seconds"] for network in trained) / 3600
    beyond = " and terms that are not the paper's" if record.network("paper") else ""
    return f"""---
{_front_matter(licence, record)}
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

timm (`local-dir:`, `hf-hub:`) and transformers (`AutoModel`) load the same folder and return the
full features; cut them at {spec.invariant_dim}. After `import clever_zoo.timm` timm knows the model
as `{timm_name(spec.name)}`.

## Input
Upright 8-bit RGB. The short side is resized to {p.resize_px} pixels (bicubic, antialiased), the
central {p.input_size_px}x{p.input_size_px} cut out; then (value / 255 - mean) / std with mean
{p.mean} and std {p.std}.

## Use and misuse
- Good for: {data.good_for}.
- Not for: {data.not_for}.
- For colour photographs train one of the repository's ImageNet recipes instead
  (`training/recipes/*.in100-*.toml`, `*.in1k-*.toml`; a GPU is needed and no weights of them are
  released), or take a general image encoder.

## Limits
- The halves are named for what they are meant for. Trust what they were measured to hold.
- One training seed: differences of up to three points between networks may be chance.
- Nothing was measured on other data than {data.title}, on how errors spread over groups of people,
  or against adversaries.
- Of a picture that is not square the ends of its long side are not seen.
{chr(10).join(f"- {sentence}" for sentence in shortfalls(record))}

## Data and training
{data.title}: {data.description}. Method: CLeVER (arXiv 2406.00262) on DINO with rotated
views{beyond}; the recipe states what differs from the paper's.

{chr(10).join(map(_training_line, trained))}

## Compute and energy
The training above took {hours:.1f} hours in all, on the hardware named there. Energy was
metered only where a line above says so.

## Results
{_results_section(spec, record)}

## Files and digests
`{weights.filename}`: {weights.size_bytes:,} bytes, loaded as float32; sha256
`{weights.sha256}`. `clever-zoo verify {spec.name}` recomputes the digest and the values of
golden.json. The networks of the results, as they are stored:

{chr(10).join(_digest_lines(record))}

## Licence and citation
Weights and code: {licence}. Please cite the paper:

```bibtex
{CITATION}
```
"""

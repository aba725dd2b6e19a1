"""What an installation can do, on real pictures: `make demo` or ``python -m clever_zoo.demo``.

Embeds the bundled pictures and rotated copies of them with the released weights, through the
same code as ``clever-zoo embed``, and draws a report that compares both halves and raw pixels.
"""

import html
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image

from clever_zoo.bulk import embed_files
from clever_zoo.cli import fail
from clever_zoo.embedding import Embedding, unit_rows
from clever_zoo.encoder import Encoder, from_pretrained
from clever_zoo.errors import BackendMissingError, CleverZooError
from clever_zoo.files import write_atomic
from clever_zoo.registry import DEFAULT_MODEL
from clever_zoo.samples import sample_class, sample_paths

try:
    import matplotlib as mpl
    import pyarrow.parquet as pq
    from matplotlib.figure import Figure

    from clever_zoo.figures import GREY, STYLE, data_uri, figure_tag, html_page
except ImportError as error:
    raise BackendMissingError(
        f'{error.name} is missing: pip install "clever-zoo[bulk,train]"'
    ) from error

Vectors = NDArray[np.float32]

NEIGHBORS = 5
QUERIES = 12
CURVE_ANGLES = range(-180, 181, 15)
CURVE_PICTURES = 60


def write_rotated_copies(paths: list[Path], folder: Path) -> list[float]:
    """Save each picture rotated by its own angle in [-90, 90] degrees; returns the angles."""
    folder.mkdir(parents=True, exist_ok=True)
    angles = [float(a) for a in np.random.default_rng(0).uniform(-90, 90, len(paths))]
    for path, angle in zip(paths, angles, strict=True):
        Image.open(path).rotate(angle).save(folder / path.name)
    return angles


def read_parquet(path: Path) -> Embedding[Vectors]:
    """Both halves of an embeddings file, in the order of its rows."""
    table = pq.read_table(path)
    return Embedding(
        *(
            np.stack(table[name].to_numpy()).astype(np.float32)
            for name in ("invariant", "equivariant")
        )
    )


def raw_pixels(paths: list[Path]) -> Vectors:
    """The control: the bytes of each picture as one vector."""
    return np.stack([np.asarray(Image.open(p), dtype=np.float32).ravel() / 255 for p in paths])


def rank_neighbors(queries: Vectors, gallery: Vectors) -> NDArray[np.int64]:
    """(Q, N - 1) gallery indices by falling cosine, without the query's own original (same row)."""
    similarity = unit_rows(queries) @ unit_rows(gallery).T
    np.fill_diagonal(similarity, -np.inf)
    return np.argsort(-similarity, axis=1)[:, :-1]


def same_class_share(ranks: NDArray[np.int64], classes: NDArray[np.str_]) -> float:
    """Percentage of queries whose nearest neighbour has their class."""
    return float((classes[ranks[:, 0]] == classes).mean() * 100)


def similarity_curves(
    encoder: Encoder, paths: list[Path]
) -> tuple[dict[str, Vectors], dict[str, float]]:
    """Cosine of each half between a picture and its rotation, (angles, pictures).

    Also the mean cosine of two different upright pictures, to read the curves against.
    """
    images = [Image.open(p).convert("RGB") for p in paths]
    original = encoder.embed(images).normalized()
    count = len(images)
    others = {
        name: float(((half @ half.T).sum() - count) / (count * (count - 1)))
        for name, half in original._asdict().items()
    }
    curves: dict[str, list[Vectors]] = {name: [] for name in original._fields}
    for angle in CURVE_ANGLES:
        turned = encoder.embed([image.rotate(angle) for image in images]).normalized()
        for name, half in turned._asdict().items():
            curves[name].append((half * getattr(original, name)).sum(1))
    return {name: np.stack(rows) for name, rows in curves.items()}, others


def draw_curves(curves: dict[str, Vectors], others: dict[str, float]) -> Figure:
    """Mean and middle half of the pictures, per angle and half; dashed: different pictures."""
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, values in curves.items():
        low, high = np.percentile(values, [25, 75], axis=1)
        (line,) = axes.plot(CURVE_ANGLES, values.mean(1), marker="o", markersize=3, label=name)
        axes.axhline(others[name], linestyle="--", color=line.get_color())
        axes.fill_between(CURVE_ANGLES, low, high, alpha=0.2)
    axes.axvspan(-90, 90, color=GREY, alpha=0.15, zorder=-1, label="angles of the training views")
    axes.set(xlabel="rotation (degrees)", ylabel="cosine to the upright picture")
    axes.set_xticks(range(-180, 181, 45))
    axes.legend(frameon=False)
    return figure


def draw_projection(
    embedding: Embedding[Vectors], classes: NDArray[np.str_], angles: NDArray[np.float64]
) -> Figure:
    """First two principal components of each half: by class above, by rotation below."""
    figure = Figure(figsize=(9, 8), layout="constrained")
    grid = figure.subplots(2, 2)
    names = sorted(set(classes))
    for column, (half, rows) in enumerate(embedding._asdict().items()):
        points_on_sphere = unit_rows(rows)
        centered = points_on_sphere - points_on_sphere.mean(0)
        left, scale, _ = np.linalg.svd(centered, full_matrices=False)
        x, y = (left[:, :2] * scale[:2]).T
        for i, name in enumerate(names):
            chosen = classes == name
            grid[0, column].scatter(x[chosen], y[chosen], s=9, color=f"C{i}", label=name)
        points = grid[1, column].scatter(x, y, s=9, c=angles, cmap="twilight_shifted")
        grid[0, column].set_title(f"{half} half, by class")
        grid[1, column].set_title(f"{half} half, by rotation")
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    grid[0, 1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.colorbar(points, ax=grid[1, 1], label="degrees")
    return figure


def _thumbnail(path: Path, css_class: str) -> str:
    name = html.escape(f"{sample_class(path)}: {path.name}")
    source = data_uri(path.read_bytes())
    return f'<img class="{css_class}" src="{source}" alt="{name}" title="{name}">'


def neighbor_rows(
    queries: list[Path],
    gallery: list[Path],
    rankings: dict[str, NDArray[np.int64]],
) -> str:
    """An HTML table: a rotated query and its nearest pictures by each kind of vector."""
    rows = []
    for i in range(0, len(queries), len(queries) // QUERIES):
        cells = [f"<td>{_thumbnail(queries[i], 'query')}<br>{sample_class(queries[i])}</td>"]
        for ranks in rankings.values():
            pictures = "".join(
                _thumbnail(
                    gallery[j],
                    "hit" if sample_class(gallery[j]) == sample_class(queries[i]) else "miss",
                )
                for j in ranks[i, :NEIGHBORS]
            )
            cells.append(f"<td>{pictures}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = "".join(f"<th>{name}</th>" for name in ("rotated query", *rankings))
    return f'<div class="wide"><table><tr>{heads}</tr>{"".join(rows)}</table></div>'


_STYLE = """<style>
td img { width: 44px; image-rendering: pixelated; margin: 1px; border: 3px solid transparent }
img.hit { border-color: var(--good) } img.miss { border-color: var(--bad) }
</style>"""


def run_demo(out: Path, model: str) -> list[str]:
    """Write embeddings.parquet, report.html and the rotated pictures; returns the headlines."""
    encoder = from_pretrained(model)
    originals = sample_paths()
    angles = write_rotated_copies(originals, out / "rotated")
    queries = [out / "rotated" / path.name for path in originals]
    embed_files([*originals, *queries], encoder, out / "embeddings.parquet")
    embedding = read_parquet(out / "embeddings.parquet")

    count = len(originals)
    pixels = raw_pixels([*originals, *queries])
    vectors = {
        "invariant half": embedding.invariant,
        "full vector": embedding.full,
        "raw pixels": pixels,
    }
    rankings = {name: rank_neighbors(v[count:], v[:count]) for name, v in vectors.items()}
    classes = np.array([sample_class(path) for path in originals])
    shares = {name: same_class_share(ranks, classes) for name, ranks in rankings.items()}
    curves, others = similarity_curves(encoder, originals[:: count // CURVE_PICTURES])
    at_90 = {name: float(v[list(CURVE_ANGLES).index(90)].mean()) for name, v in curves.items()}
    best = max(shares, key=lambda name: shares[name])
    headlines = [
        f"{2 * count} pictures embedded: {encoder.spec.invariant_dim} invariant and "
        f"{encoder.spec.equivariant_dim} equivariant values each",
        "nearest neighbour of a rotated picture has its class: "
        + ", ".join(f"{name} {share:.0f} %" for name, share in shares.items())
        + f" (best: {best})",
        "cosine to the upright picture after a turn of 90°: "
        + ", ".join(
            f"{name} half {value:.3f} (two different pictures: {others[name]:.3f})"
            for name, value in at_90.items()
        ),
    ]
    digest = encoder.spec.weights.sha256 if encoder.spec.weights else ""
    items = "".join(f"<li>{html.escape(line)}</li>" for line in headlines)
    about = f"<p>Model <b>{encoder.spec.name}</b>, weights sha256 <code>{digest}</code>.</p>"
    legend = "<p>Green: same class; red: another. The query's own original is left out.</p>"
    with mpl.rc_context(STYLE):
        curve_figure = figure_tag(
            draw_curves(curves, others),
            f"Mean and middle half of {CURVE_PICTURES} pictures; dashed: two different pictures.",
            transparent=True,
        )
        projection = figure_tag(
            draw_projection(
                embedding, np.concatenate([classes, classes]), np.array([0.0] * count + angles)
            ),
            "Principal components of the normalised halves; upright and rotated pictures.",
            transparent=True,
        )
    sections = [
        (
            "Nearest neighbours of rotated queries",
            legend + neighbor_rows(queries, originals, rankings),
        ),
        ("Similarity against rotation", curve_figure),
        ("Both halves in two dimensions", projection),
    ]
    title = f"Two halves of {2 * count} pictures"
    page = html_page(title, sections, lead=f"{_STYLE}{about}<ul>{items}</ul>")
    write_atomic(out / "report.html", page.encode())
    return headlines


def main(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("demo"),
    model: Annotated[str, typer.Option(help="As for `clever-zoo embed`.")] = DEFAULT_MODEL,
) -> None:
    """Embed the bundled pictures and rotated copies, and draw a report."""
    try:
        headlines = run_demo(out, model)
    except CleverZooError as error:
        fail(error)
    for line in headlines:
        typer.echo(f"- {line}")
    typer.echo(f"embeddings: {out / 'embeddings.parquet'}\nreport:     {out / 'report.html'}")


if __name__ == "__main__":
    typer.run(main)

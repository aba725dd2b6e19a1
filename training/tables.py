"""Write the cards of the released models and the tables of both READMEs from their records.

python -m training.tables
"""

import json
from pathlib import Path
from typing import Any

from clever_zoo.cards import render_card, results_table
from clever_zoo.errors import DataError
from clever_zoo.files import write_atomic
from clever_zoo.registry import list_models, model_info

CHECKOUT = Path(__file__).parent.parent
RECORDS = CHECKOUT / "training" / "records"

Record = dict[str, Any]


def rendered_files() -> dict[Path, str]:
    """Path -> content of every file that is written from records.

    Raises:
        DataError: If a README has lost its markers.
    """
    files: dict[Path, str] = {}
    sections = []
    for name in list_models():
        folder = CHECKOUT / "model_cards" / name
        record = _read(folder / "results.json")
        files[folder / "README.md"] = render_card(model_info(name), record)
        sections.append(f"`{name}` on {record['dataset']}:\n\n{results_table(record)}")
    readme, training_readme = CHECKOUT / "README.md", CHECKOUT / "training" / "README.md"
    text = readme.read_text(encoding="utf-8")
    files[readme] = _filled(text, "results", "\n\n".join(sections), readme)
    text = training_readme.read_text(encoding="utf-8")
    text = _filled(text, "trials", trials_table(), training_readme)
    files[training_readme] = _filled(text, "bench", bench_tables(), training_readme)
    return files


def trials_table() -> str:
    """The one-epoch trials side by side, with the controls of the first."""
    records = [_read(path) for path in sorted(RECORDS.glob("trial-*.json"))]
    columns = {record["model"]: record["columns"][record["model"]] for record in records}
    controls = {name: records[0]["columns"][name] for name in ("untrained", "pixels")}
    facts = [
        f"- `{name}`: seed {t['seed']}, {t['steps']} steps, {t['images_seen']:,} images in "
        f"{t['seconds'] / 60:.0f} minutes on {t['hardware']}; commit {t['commit'][:7]}"
        for name, t in ((name, column["training"]) for name, column in columns.items())
    ]
    return results_table({"columns": columns | controls}) + "\n\n" + "\n".join(facts)


def bench_tables() -> str:
    """Views, heads and steps as `python -m training.bench` recorded them."""
    views, heads, step = (_read(RECORDS / f"bench-{n}.json") for n in ("views", "heads", "step"))
    figures = {name: f["median"] for name, f in views["summary"].items()}
    spread = views["summary"]["ratio"]
    whole, chunked = heads["forms"].values()
    lines = [
        f"- **Views** ({views['title']}; {_where(views)}): batched {figures['batched']:.0f} "
        f"images/s, reference {figures['reference']:.0f}: ratio {figures['ratio']:.2f} "
        f"({spread['min']:.2f}..{spread['max']:.2f}).",
        f"- **Two heads of {heads['settings']['prototypes']:,} prototypes** at batch "
        f"{heads['settings']['batch']} ({_where(heads)}): peak {whole['peak_bytes'] / 1e9:.2f} GB "
        f"all at once, {chunked['peak_bytes'] / 1e9:.2f} GB in chunks, ratio "
        f"{chunked['peak_bytes'] / whole['peak_bytes']:.2f}; gradient norms "
        f"{whole['gradient_norm']:.6g} and {chunked['gradient_norm']:.6g}; "
        f"{whole['seconds']:.1f} s and {chunked['seconds']:.1f} s.",
        f"- **Steps** (batch {step['settings']['batch']}, {step['settings']['precision']}; "
        f"{_where(step)}); the peer is the same step fed by the reference views of all cores:",
        "",
        "| recipe | images/s | ratio to the peer | waiting for data | 200 epochs of ImageNet-100 |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in step["recipes"].items():
        lines.append(
            f"| `{name}` | {row['images_per_s']:.2f} | "
            f"{row['images_per_s'] / row['peer_images_per_s']:.2f} | {row['data_share']:.1%} | "
            f"{row['in100_hours']:,.0f} h |"
        )
    return "\n".join(lines)


def _where(record: Record) -> str:
    environment = record["environment"]
    return f"{environment['hardware']}, commit {environment['commit'][:7]}"


def _read(path: Path) -> Record:
    return json.loads(path.read_text(encoding="utf-8"))


def _filled(text: str, marker: str, content: str, path: Path) -> str:
    begin, end = f"<!-- {marker}: begin -->", f"<!-- {marker}: end -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise DataError(f"{path} has lost the line {begin} or {end}")
    return f"{before}{begin}\n{content}\n{end}{after}"


if __name__ == "__main__":
    for path, content in rendered_files().items():
        write_atomic(path, content.encode())

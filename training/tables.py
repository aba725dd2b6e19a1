"""Write the cards of the released models and the README's table from their records.

python -m training.tables
"""

import json
from pathlib import Path

from clever_zoo.cards import render_card, results_table
from clever_zoo.errors import DataError
from clever_zoo.files import write_atomic
from clever_zoo.registry import list_models, model_info

CHECKOUT = Path(__file__).parent.parent
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def rendered_files() -> dict[Path, str]:
    """Path -> content of every file that is written from records.

    Raises:
        DataError: If the README has lost its markers.
    """
    files: dict[Path, str] = {}
    sections = []
    for name in list_models():
        folder = CHECKOUT / "model_cards" / name
        record = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        files[folder / "README.md"] = render_card(model_info(name), record)
        sections.append(f"`{name}` on {record['dataset']}:\n\n{results_table(record)}")
    readme = CHECKOUT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise DataError(f"{readme} has lost the line {BEGIN} or {END}")
    tables = "\n\n".join(sections)
    files[readme] = f"{before}{BEGIN}\n{tables}\n{END}{after}"
    return files


if __name__ == "__main__":
    for path, content in rendered_files().items():
        write_atomic(path, content.encode())

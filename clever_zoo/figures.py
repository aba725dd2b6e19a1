"""HTML pages with pictures and tables inside, so that a report is one file."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.figure import Figure

# A grey of equal contrast on white and on the dark page's black; figures are transparent.
GREY = "#777777"
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), GREY),
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
}

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #ddd; --soft: #555; --bad: #b3261e; --good: #1b7f3b }}
@media (prefers-color-scheme: dark) {{
  :root {{ --line: #333; --soft: #aaa; --bad: #ff8a80; --good: #7ddb97 }}
  body {{ background: #0d0d0d; color: #ddd }}
}}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: auto; padding: 1rem }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse }}
td, th {{ padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top }}
td:first-child {{ white-space: nowrap }}
tr + tr {{ border-top: 1px solid var(--line) }}
td {{ font-variant-numeric: tabular-nums; overflow-wrap: anywhere }}
figure {{ margin: 1rem 0 }} figure img {{ max-width: 100% }}
figcaption, p {{ color: var(--soft) }}
.alive b {{ color: var(--good) }} .collapsed, .collapsed b {{ color: var(--bad) }}
</style>
<h1>{title}</h1>
{lead}
{sections}
</html>
"""


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain texts, in a box that scrolls sideways."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table>{line(head, "th")}{body}</table></div>'


def html_page(title: str, sections: Iterable[tuple[str, str]], *, lead: str = "") -> str:
    """A page for light and dark screens that loads nothing.

    Args:
        title: Plain text.
        sections: Heading and HTML of each.
        lead: HTML above the first heading.
    """
    body = "".join(f"<h2>{heading}</h2>{content}\n" for heading, content in sections)
    return _PAGE.format(title=html.escape(title), lead=lead, sections=body)


def data_uri(png: bytes) -> str:
    """A PNG file's bytes as the `src` of an image."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def figure_tag(figure: Figure, caption: str, *, transparent: bool = False) -> str:
    """An HTML figure with its caption; `transparent` shows the page's own background."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, transparent=transparent)
    return (
        f'<figure><img src="{data_uri(buffer.getvalue())}" alt="{html.escape(caption)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )

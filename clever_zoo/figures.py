"""Pictures inside an HTML page, so that a report is one file."""

import base64
import html
import io

from matplotlib.figure import Figure


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

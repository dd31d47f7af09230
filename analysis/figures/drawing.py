"""One drawn figure, and how it is saved: PNG and SVG, the same bytes for the same runs.

Each file carries the run ids and the command that redraws it. Knows nothing of what is drawn.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from analysis.output import write_whole


@dataclass(frozen=True)
class Drawing:
    name: str  # file name without extension
    title: str
    figure: Figure
    run_ids: tuple[str, ...]


@dataclass(frozen=True)
class Skipped:
    """A figure that these runs cannot fill, and why, as one line."""

    name: str
    reason: str


def save(drawing: Drawing, folder: Path, *, command: str) -> list[Path]:
    """Writes `<name>.png` and `<name>.svg`; returns their paths."""
    runs = "runs: " + ", ".join(dict.fromkeys(drawing.run_ids))
    png = {
        "Title": drawing.title,
        "Description": runs,
        "Comment": f"redraw: {command}",
        "Software": "stateful_gpt analysis",
    }
    svg = {
        "Title": drawing.title,
        "Description": f"{runs}; redraw: {command}",
        "Creator": "stateful_gpt analysis",
        "Date": None,  # the same runs give the same bytes on any day
    }
    paths = []
    for suffix, metadata in (("png", png), ("svg", svg)):
        content = io.BytesIO()
        drawing.figure.savefig(content, format=suffix, metadata=metadata)
        path = folder / f"{drawing.name}.{suffix}"
        write_whole(path, content.getvalue())
        paths.append(path)
    return paths


def file_name(figure: str, prompt_id: str, all_prompts: tuple[str, ...]) -> str:
    """`heat_map_<prompt_id>`, with characters that no file system minds, still one per prompt."""
    names = [re.sub(r"[^A-Za-z0-9._-]+", "-", one)[:60] for one in all_prompts]
    place = all_prompts.index(prompt_id)
    name = names[place]
    folded = [one.casefold() for one in names]  # some file systems ignore case
    if not name.strip(".-") or folded.count(name.casefold()) > 1:
        name = f"{name}-{place + 1}"
    return f"{figure}_{name}"

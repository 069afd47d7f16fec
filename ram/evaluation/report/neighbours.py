"""The reports of one output folder, which link each other."""

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

SAVED, PAGE = "report.json", "report.html"
DEPTH = 4  # folders between the output folder and a report


def reports_below(root: Path) -> Iterator[Path]:
    """Yield the folders of the reports below an output folder, those that were set aside left out."""
    for depth in range(DEPTH + 1):
        for path in sorted(root.glob("*/" * depth + SAVED)):
            if not any(part.endswith(".old") for part in path.relative_to(root).parts):
                yield path.parent


def others(folder: Path, root: str | None) -> list[Path]:
    """Return the folders of the other reports of an output folder.

    Args:
        folder: of the report.
        root: the path from there to the output folder, "." or some ".."; None if it is unknown.
    """
    if root is None or not set(Path(root).parts) <= {".."}:
        return []
    return [path for path in reports_below(folder / root) if path.resolve() != folder.resolve()]


def links(folder: Path, root: str | None) -> list[tuple[str, str]]:
    """Return a text and an address, relative to `folder`, for each other report of an output folder."""
    found = []
    for path in others(folder, root):
        name = os.path.relpath(path, folder / str(root))
        address = os.path.relpath(path / PAGE, folder)
        found.append((path.resolve().name if name == "." else name, quote(address.replace(os.sep, "/"))))
    return found

"""What the tools that write a report share: a table, a picture, and the directory that holds them."""

import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from textgen_jax import errors


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
  """A table's lines: the first column to the left, the others to the right."""
  widths = [max(len(cells[i]) for cells in rows) for i in range(len(rows[0]))]
  return ['  '.join([cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]) for cells in rows]


def printable(text: str) -> str:
  """Text that UTF-8 can hold: half a surrogate pair becomes a question mark."""
  return text.encode('utf-8', 'replace').decode('utf-8')


def check_directory(output: str | None) -> None:
  """Raises UserError where `--output` is a file."""
  if output and pathlib.Path(output).is_file():
    raise errors.UserError(f'output={output!r} is a file: name a directory')


def save_picture(path: pathlib.Path, inches: tuple[float, float], draw: Callable[[Any], None]) -> None:
  """Writes what `draw` puts on a matplotlib Figure; without matplotlib it says so, and writes nothing."""
  try:
    from matplotlib import figure
  except ImportError:
    print(f"no {path.name} without matplotlib: pip install 'textgen_jax[inspect]'", file=sys.stderr)
    return
  picture = figure.Figure(figsize=inches, layout='constrained')
  draw(picture)
  picture.savefig(path, dpi=120)

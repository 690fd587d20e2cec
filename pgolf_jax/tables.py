"""Tables as plain text that fold to the width of the terminal."""

import contextlib
import contextvars
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence

_UNFOLDED = 100_000  # columns of a file or a pipe
_LEAST = 24  # columns of a last cell that is wrapped within the table
_width: contextvars.ContextVar[int | None] = contextvars.ContextVar("width", default=None)


@contextlib.contextmanager
def unfolded() -> Iterator[None]:
  """Tables that are made into text in the block keep their whole width."""
  token = _width.set(_UNFOLDED)
  try:
    yield
  finally:
    _width.reset(token)


def line_width() -> int:
  """Returns the columns of a line: the terminal's; without end where standard output is a file or a pipe."""
  if (width := _width.get()) is not None:
    return width
  return shutil.get_terminal_size().columns if sys.stdout.isatty() else _UNFOLDED


def page_width() -> int:
  """Returns the columns of running text: the terminal's, but at least 40 and at most 120."""
  return max(40, min(shutil.get_terminal_size().columns, 120))


class Table:
  """Rows under a head, made into text when they are printed, for the width that there is then.

  Where the rows are too wide, the last column is wrapped; where that is not enough, each row becomes a few lines.

  Args:
    head: the columns' names; those of numbers begin with ">" and are aligned to the right.
    rows: of as many cells, which are shown by `str`.
    title: a line above.
  """

  def __init__(self, head: Sequence[str], rows: Iterable[Sequence[object]], title: str = ""):
    self._is_right = [name.startswith(">") for name in head]
    self._head = [name.removeprefix(">") for name in head]
    self._rows = [[str(cell) for cell in row] for row in rows]
    self._title = title

  def __str__(self) -> str:
    return self.text(line_width())

  def text(self, width: int) -> str:
    """Returns the table for lines of at most so many columns; a word that is longer stands alone."""
    lines = [self._head, *self._rows] if any(self._head) else self._rows
    widths = [max((len(row[i]) for row in lines), default=0) for i in range(len(self._head))]
    before = sum(widths[:-1]) + 2 * (len(widths) - 1)
    title = [self._title] if self._title else []
    if before + widths[-1] <= width:
      return "\n".join([*title, *(self._line(row, widths) for row in lines)])
    if not self._is_right[-1] and width - before >= _LEAST:
      return "\n".join([*title, *(self._wrapped(row, widths, before, width) for row in lines)])
    return "\n".join([*title, *(self._stacked(row, width) for row in self._rows)])

  def _line(self, row: list[str], widths: list[int]) -> str:
    cells = zip(row, widths, self._is_right, strict=True)
    return "  ".join(cell.rjust(w) if right else cell.ljust(w) for cell, w, right in cells).rstrip()

  def _wrapped(self, row: list[str], widths: list[int], before: int, width: int) -> str:
    first = self._line([*row[:-1], ""], [*widths[:-1], 0])
    parts = textwrap.wrap(row[-1], width - before, break_long_words=False, break_on_hyphens=False) or [""]
    return "\n".join([f"{first:<{before}}{parts[0]}".rstrip(), *(" " * before + part for part in parts[1:])])

  def _stacked(self, row: list[str], width: int) -> str:
    lines = textwrap.wrap(row[0], width, break_long_words=False, break_on_hyphens=False)
    for name, cell in zip(self._head[1:], row[1:], strict=True):
      if cell:
        text = f"{name}: {cell}" if name else cell
        lines += textwrap.wrap(
          text, width, initial_indent="  ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
        )
    return "\n".join(lines)

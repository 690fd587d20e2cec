import logging
import re

from hypothesis import given
from hypothesis import strategies as st

from pgolf_jax.errors import Check, checks_table
from pgolf_jax.runtime.log import _WideFormatter
from pgolf_jax.tables import Table

CHECKS = [
  Check("hints", True, "built again from the tokens alone, all 1,234 of them the same"),
  Check("bytes", None, ""),
]


def test_a_table_that_fits_is_one_line_a_row():
  table = Table(("split", ">tokens", "note"), [("train", "12,345", "two shards"), ("val", "7", "")], title="web")
  assert table.text(80).splitlines() == [
    "web",
    "split  tokens  note",
    "train  12,345  two shards",
    "val         7",
  ]


def test_a_long_last_column_is_wrapped_within_the_table():
  assert checks_table(CHECKS).text(60).splitlines() == [
    "holds     hints  built again from the tokens alone, all",
    "                 1,234 of them the same",
    "unproved  bytes",
  ]


def test_where_that_is_not_enough_each_row_becomes_a_few_lines():
  table = Table(
    ("", ">bits per byte", ">seconds", ""), [("test-time training", "1.55249", "82.3", "strict order, cached")]
  )
  assert table.text(40).splitlines() == [
    "test-time training",
    "  bits per byte: 1.55249",
    "  seconds: 82.3",
    "  strict order, cached",
  ]


words = st.text("abc1.,", min_size=1, max_size=9)
cells = st.lists(words, max_size=12).map(" ".join)


@given(st.lists(st.tuples(words, cells, cells), max_size=5), st.integers(40, 120), st.booleans())
def test_no_line_is_too_long_and_no_word_is_lost(rows, width, is_right):
  table = Table(("name", ">count" if is_right else "kind", "finding"), rows)
  text = table.text(width)
  assert all(len(line) <= width for line in text.splitlines())
  found = re.findall(r"\S+", text)
  for row in rows:
    for cell in row:
      assert all(word in found for word in cell.split())


def test_a_terminal_folds_a_table_that_a_file_has_whole(monkeypatch):
  monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
  monkeypatch.setenv("COLUMNS", "60")
  record = logging.makeLogRecord({"msg": "audit:\n%s", "args": (checks_table(CHECKS),)})
  assert len(logging.Formatter().format(record).splitlines()) == 4
  assert len(_WideFormatter().format(record).splitlines()) == 3

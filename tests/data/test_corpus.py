"""Corpora: what is read, that reading can begin at any position, and every way in which a file can be faulty."""

import json
import tracemalloc

import pytest
import zstandard

from pgolf_jax.data import corpus
from pgolf_jax.data.corpus import Position, open_corpus, read_batches
from pgolf_jax.errors import UserError

TEXTS = [f"Document {i}: é\n日本\r\n" + "x" * (i % 7) for i in range(50)]
LINES = "".join(
  json.dumps({"text": text, "source": "test"}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(TEXTS)
)


def texts_of(path):
  return [document.text() for _, document, _ in open_corpus(path).read(Position())]


@pytest.fixture(params=["plain", "zst", "zst of several frames", "txt"])
def source(request, tmp_path):
  """The same documents in each form."""
  if request.param == "txt":
    for i, text in enumerate(TEXTS):
      folder = tmp_path / "texts" / str(i // 10)
      folder.mkdir(parents=True, exist_ok=True)
      (folder / f"{i:02d}.txt").write_bytes(text.encode())
    (tmp_path / "texts" / "readme.md").write_text("no document")
    return tmp_path / "texts"
  raw = LINES.replace("\n", "\n\n", 3).encode().removesuffix(b"\n")  # blank lines, and no line end at the end
  path = tmp_path / ("docs.jsonl" if request.param == "plain" else "docs.jsonl.zst")
  if request.param == "plain":
    path.write_bytes(raw)
  elif request.param == "zst":
    path.write_bytes(zstandard.compress(raw))
  else:
    path.write_bytes(b"".join(zstandard.compress(raw[i : i + 700]) for i in range(0, len(raw), 700)))
  return path


def test_documents_come_in_order_and_unchanged(source):
  assert texts_of(source) == TEXTS


def test_reading_begins_at_any_position(source):
  positions = [position for position, _, _ in open_corpus(source).read(Position())]
  assert [position.document for position in positions] == list(range(len(TEXTS)))
  for position in positions[::9]:
    rest = list(open_corpus(source).read(position))
    assert [document.text() for _, document, _ in rest] == TEXTS[position.document :]
    assert [p for p, _, _ in rest] == positions[position.document :]


def test_batches_hold_the_wanted_documents_and_can_be_read_again(source, monkeypatch):
  monkeypatch.setattr(corpus, "BATCH_BYTES", 100)
  opened = open_corpus(source)
  batches = list(read_batches(opened, Position(), wanted=lambda i: i % 3 == 1, stop=40))
  assert len(batches) > 3
  assert [document.text() for batch in batches for document in batch.documents] == TEXTS[1:40:3]
  assert [batch.bytes_read for batch in batches] == sorted(batch.bytes_read for batch in batches)
  assert batches[-1].bytes_read == opened.size
  again = list(read_batches(opened, batches[2].start, wanted=lambda i: i % 3 == 1, stop=40))
  assert [batch.documents for batch in again] == [batch.documents for batch in batches[2:]]


def test_identity_tells_files_apart(tmp_path):
  path = tmp_path / "docs.jsonl"
  path.write_text(LINES)
  identity = open_corpus(path).identity()
  assert identity == open_corpus(path).identity() and identity["bytes"] == len(LINES.encode())
  path.write_text(LINES.replace("Document 9", "Document X"))
  assert open_corpus(path).identity() != identity


GOOD = b'{"text": "fine"}\n'
BAD_LINES = [
  (b'{"text": "broken\n', r"docs\.jsonl, line 3: broken JSON at column 17"),
  (b"\xef\xbb\xbf" + GOOD, r"line 3: broken JSON .*BOM"),
  (b'{"txt": "x"}\n', r'line 3: no "text"'),
  (b'{"text": 7}\n', r'line 3: no "text"'),
  (b'"just a string"\n', r'line 3: no "text"'),
  (b'{"text": ""}\n', "line 3: an empty document"),
  (b'{"text": "\xff"}\n', r"line 3: invalid UTF-8 at byte 10"),
  (b'{"text": "ab\\ud83d"}\n', r"line 3: half a surrogate pair \('\\ud83d'\) at character 2"),
]


@pytest.mark.parametrize("line, message", BAD_LINES)
def test_bad_line_is_named(tmp_path, line, message):
  path = tmp_path / "docs.jsonl"
  path.write_bytes(GOOD + b"\n" + line + GOOD)
  with pytest.raises(UserError, match=message):
    texts_of(path)


@pytest.mark.parametrize(
  "raw, message", [(b"", "b.txt: an empty document"), (b"ab\xc3", "b.txt: invalid UTF-8 at byte 2")]
)
def test_bad_text_file_is_named(tmp_path, raw, message):
  (tmp_path / "a.txt").write_text("fine")
  (tmp_path / "b.txt").write_bytes(raw)
  with pytest.raises(UserError, match=message):
    texts_of(tmp_path)


def test_cut_off_and_damaged_zstd_are_refused(tmp_path):
  path = tmp_path / "docs.jsonl.zst"
  whole = zstandard.compress((LINES * 100).encode())
  path.write_bytes(whole[:-20])
  with pytest.raises(UserError, match=r"docs\.jsonl\.zst: the file ends in the middle"):
    texts_of(path)
  path.write_bytes(b"no zstd at all, only text")
  with pytest.raises(UserError, match=r"docs\.jsonl\.zst: damaged zstd data"):
    texts_of(path)


def test_a_missing_path_and_an_unknown_kind_are_refused(tmp_path):
  with pytest.raises(UserError, match="no such file"):
    open_corpus(tmp_path / "nothing.jsonl")
  with pytest.raises(UserError, match=r"no \.txt file"):
    open_corpus(tmp_path)
  (tmp_path / "docs.parquet").touch()
  with pytest.raises(UserError, match=r"docs\.parquet: its kind is unknown"):
    open_corpus(tmp_path / "docs.parquet")


def zstd_bomb(path, line_end=b""):
  """Writes about a hundred kilobytes that stand for a gigabyte of blanks."""
  compressor = zstandard.ZstdCompressor(level=19).compressobj()
  data = b"".join([*(compressor.compress(b" " * (1 << 20) + line_end) for _ in range(1024)), compressor.flush()])
  path.write_bytes(data)
  assert len(data) < 1 << 18
  return path


def test_a_zstd_bomb_of_one_line_is_refused_in_bounded_memory(tmp_path):
  corpus = open_corpus(zstd_bomb(tmp_path / "bomb.jsonl.zst"), max_document=1 << 22)
  tracemalloc.start()
  with pytest.raises(UserError, match=r"bomb\.jsonl\.zst, line 1: document 1 has more than 4194304 bytes"):
    next(corpus.read(Position()))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 48 << 20


def test_a_zstd_bomb_of_blank_lines_is_refused_in_bounded_memory(tmp_path):
  corpus = open_corpus(zstd_bomb(tmp_path / "bomb.jsonl.zst", b"\n"))
  tracemalloc.start()
  with pytest.raises(UserError, match=r"bomb\.jsonl\.zst, line 1: ends 1048576 bytes of blank lines"):
    next(corpus.read(Position()))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 48 << 20


def test_an_endless_line_is_refused_by_file_and_document(tmp_path):
  path = tmp_path / "endless.jsonl"
  path.write_bytes(b'{"text": "a"}\n' + b"x" * 5000)
  documents = open_corpus(path, max_document=1000).read(Position())
  assert next(documents)[1].text() == "a"
  with pytest.raises(UserError, match=r"endless\.jsonl, line 2: document 2 has more than 1000 bytes.*--max-document"):
    next(documents)
  (tmp_path / "texts").mkdir()
  (tmp_path / "texts" / "a.txt").write_bytes(b"x" * 1001)
  with pytest.raises(UserError, match=r"a\.txt: document 1 has more than 1000 bytes"):
    next(open_corpus(tmp_path / "texts", max_document=1000).read(Position()))


def test_a_window_of_gigabytes_is_refused(tmp_path):
  path = tmp_path / "window.jsonl.zst"
  magic, descriptor, window = b"\x28\xb5\x2f\xfd", b"\x00", bytes([(30 - 10) << 3])
  path.write_bytes(magic + descriptor + window + b"\x01\x00\x00")  # and an empty last block
  with pytest.raises(UserError, match=r"window\.jsonl\.zst: made with a window of zstd above"):
    next(open_corpus(path).read(Position()))


@pytest.mark.parametrize("line", [b"[" * 100_000, b'{"text": "a", "n": ' + b"9" * 5000 + b"}"])
def test_deep_and_endless_json_is_named(tmp_path, line):
  path = tmp_path / "odd.jsonl"
  path.write_bytes(b'{"text": "a"}\n' + line + b"\n")
  documents = [document for _, document, _ in open_corpus(path).read(Position())]
  with pytest.raises(UserError, match=r"odd\.jsonl, line 2: JSON that is nested too deeply or"):
    documents[1].text()

"""Files of scores that hold anything at all: the audit says that they are damaged, and does not end in a traceback."""

import json
import math

import numpy as np
import pytest
from case import DATA, STRICT, first_broken

from pgolf_jax.audit.recheck import Subject, recheck
from pgolf_jax.errors import Check, UserError
from pgolf_jax.scoring.documents import find_documents
from pgolf_jax.scoring.record import HintsEvent, ScoreEvent, to_json
from pgolf_jax.settings.load import changed

SETTINGS = changed(STRICT, {"hints.enabled": False})
NATS = math.log(48)


def checks(folder) -> list[Check]:
  try:
    return list(recheck(Subject.read(folder, SETTINGS, DATA), folder, REPORTED))
  except UserError as error:
    return [Check("every target scored exactly once", False, str(error))]


TARGETS, BYTES = len(DATA.tokens) - 1, int(DATA.token_bytes[1:].sum())
REPORTED = {"loss": NATS, "targets": TARGETS, "bytes": BYTES, "gated": 0, "order": "strict", "method": "exact"}
REPORTED |= {name: NATS * TARGETS / math.log(2) / BYTES for name in ("bpb", "bpb_without_hints")}
REPORTED["loss"] = float(np.float32(NATS))
REPORTED |= {name: value * float(np.float32(NATS)) / NATS for name, value in REPORTED.items() if name.startswith("bpb")}


@pytest.fixture
def folder(tmp_path):
  """The scores of an evaluator that knows nothing: all tokens are as likely."""
  nll_N, lines, trace = np.full(TARGETS, NATS, np.float32), [], [HintsEvent(tuple(range(7)))]
  for document in find_documents(DATA.tokens, 1):
    at, nats = document.target_slice, document.targets * float(np.float32(NATS))
    size = int(DATA.token_bytes[at.start + 1 : at.stop + 1].sum())
    lines.append({"document": document.index, "targets": document.targets, "bytes": size})
    lines[-1] |= {"nats": nats, "nats_untilted": nats}
    trace.append(ScoreEvent(document.index, (document.index,), 0, "a", document.index))
  for name in ("nll", "model_nll", "hint_nll"):
    np.save(tmp_path / f"{name}.npy", nll_N)
  np.save(tmp_path / "times.npy", np.ones(TARGETS, np.uint8))
  for name, values in (("documents", lines), ("trace", map(to_json, trace))):
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
  return tmp_path


def test_the_folder_is_sound_before(folder):
  assert all(check.passed for check in checks(folder)), checks(folder)


EVENTS = [
  {"documents": "12"},
  {"documents": [0.0]},
  {"documents": [[1]]},
  {"documents": [True]},
  {"documents": [None]},
  {"documents": {"0": 0}},
  {"documents": 3},
  {"batch": "0"},
  {"weights": []},
  {"weights": None},
  {"carried": {}},
  {"adapters": ["a"]},
  {"event": ["score"]},
  {"more": 1},
]


@pytest.mark.parametrize("values", EVENTS, ids=str)
def test_an_event_of_other_types_is_damage(folder, values):
  lines = [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]
  lines[1] |= values
  (folder / "trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  assert "trace.jsonl is damaged" in first_broken(checks(folder)).finding


def as_archive(path):
  np.savez(path.with_suffix(".npz"), a=1)
  path.with_suffix(".npz").rename(path)


def with_a_torn_header(path):
  head = b"{'descr': (((" + b" " * 51
  path.write_bytes(b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head)


@pytest.mark.parametrize(
  "damage",
  [as_archive, with_a_torn_header, lambda path: path.write_bytes(b"PK\x03\x04"), lambda path: path.write_bytes(b"")],
)
@pytest.mark.parametrize("name", ["nll", "times"])
def test_arrays_that_are_none_are_damage(folder, name, damage):
  damage(folder / f"{name}.npy")
  assert f"{name}.npy cannot be read" in first_broken(checks(folder)).finding


LINES = [
  "[" * 100_000,
  "[]",
  "null",
  "{}",
  '{"document": []}',
  '{"document": 0, "bytes": "9"}',
  '{"document": NaN}',
  "\ud800",
]


@pytest.mark.parametrize("text", LINES, ids=lambda text: text[:20])
@pytest.mark.parametrize("name", ["documents", "trace"])
def test_lines_that_are_none_are_damage(folder, name, text):
  path = folder / f"{name}.jsonl"
  path.write_bytes(f"{text}\n".encode(errors="surrogatepass") + path.read_bytes())
  assert f"{name}.jsonl" in first_broken(checks(folder)).finding


def test_figures_too_large_for_any_number_are_wrong(folder, monkeypatch):
  monkeypatch.setitem(REPORTED, "bpb", 10**400)
  assert "results.json says bpb" in first_broken(checks(folder)).finding

"""The manifest of a data folder: what was written is read, and whatever else lies there is one sentence."""

import json

import pytest

from pgolf_jax.data.corpus import Position
from pgolf_jax.data.manifest import JOURNAL, MANIFEST, File, Journal, Manifest, Split, SplitProgress
from pgolf_jax.errors import UserError

SPLIT = Split(2, 100, 90, 0, (File("fineweb_train_000000.bin", 50, "0" * 64),))
WHOLE = Manifest("identity", "0" * 64, "lossless", 600, None, "the first 2", "0" * 64, SPLIT, Split(), {"a": [1]})


def test_a_manifest_comes_back(tmp_path):
  WHOLE.write(tmp_path)
  assert Manifest.read(tmp_path) == WHOLE


@pytest.mark.parametrize(
  ("path", "value"),
  [
    (["vocab_size"], "600"),
    (["vocab_size"], -1),
    (["vocab_size"], True),
    (["settings"], []),
    (["train"], None),
    (["train"], [1]),
    (["train", "shards"], {"a": 1}),
    (["train", "shards"], 5),
    (["train", "shards", 0], "x"),
    (["train", "shards", 0, "tokens"], 1.5),
    (["train", "shards", 0, "name"], "../../etc/passwd"),
    (["train", "documents"], {}),
  ],
)
def test_a_manifest_of_other_types_is_refused(tmp_path, path, value):
  WHOLE.write(tmp_path)
  fields = place = json.loads((tmp_path / MANIFEST).read_text())
  for step in path[:-1]:
    place = place[step]
  place[path[-1]] = value
  (tmp_path / MANIFEST).write_text(json.dumps(fields))
  with pytest.raises(UserError, match=r"manifest\.json: damaged"):
    Manifest.read(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format":\n' + "9" * 5000 + "}", '{"format": NaN}', "\x00"])
def test_a_manifest_that_is_no_json_is_refused(tmp_path, text):
  (tmp_path / MANIFEST).write_text(text)
  with pytest.raises(UserError, match=r"manifest\.json, line"):
    Manifest.read(tmp_path)


def test_a_journal_comes_back_and_one_of_other_types_is_refused(tmp_path):
  journal = Journal.open(tmp_path, {"a": 1}, 7)
  journal.splits["val"] = SplitProgress(SPLIT, Position(3, 4, 5), 6, finished=True)
  journal.save()
  assert Journal.open(tmp_path, {"a": 1}, 7).splits == journal.splits
  fields = json.loads((tmp_path / JOURNAL).read_text())
  for change in ({"splits": []}, {"splits": {"val": 1, "train": 2}}, {"splits": fields["splits"] | {"val": {}}}):
    (tmp_path / JOURNAL).write_text(json.dumps(fields | change))
    with pytest.raises(UserError, match=r"journal\.json: damaged"):
      Journal.open(tmp_path, {"a": 1}, 7)

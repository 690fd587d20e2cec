"""A whole tiny run for the audit's tests: text, training, artifact and scores."""

import json
from pathlib import Path

import numpy as np
from ttt_case import SETTINGS

from pgolf_jax import stages
from pgolf_jax.data.corpus import Holdout, Position, open_corpus
from pgolf_jax.data.folder import default_corpus
from pgolf_jax.data.prepare import Preparation, prepare
from pgolf_jax.run_folder import RunFolder
from pgolf_jax.settings.load import changed

VOCAB_SIZE = 400


def make_run(folder: Path) -> RunFolder:
  """Prepares short pieces of speeches, trains for twelve steps with a checkpoint after every four, scores."""
  texts = [document.text() for _, document, _ in default_corpus()[0].read(Position())][14:74]
  lengths = np.random.default_rng(0).integers(400, 900, len(texts))
  documents = folder / "documents.jsonl"
  documents.write_text("".join(json.dumps({"text": t[:n]}) + "\n" for t, n in zip(texts, lengths, strict=True)))
  data = folder / "data"
  prepare(data, Preparation(open_corpus(documents), None, Holdout(7), None, VOCAB_SIZE), workers=1)
  settings = changed(
    SETTINGS,
    {
      "data.path": str(data),
      "model.vocab_size": VOCAB_SIZE,
      "train.batch_tokens": 256,
      "train.seq_len": 64,
      "train.seq_schedule": "64@1.0",
      "train.iterations": 12,
      "train.checkpoint_every_steps": 4,
      "train.max_wallclock_seconds": 300.0,
      "train.warmup_steps": 0,
      "quantize.calibration_batches": 1,
      "quantize.calibration_micro_batches": 1,
      "quantize.reserve_seconds": 0.0,
      "ttt.method": "cached",
      "ttt.batch_size": 2,
      "ttt.chunk_size": 64,
      "ttt.seq_len": 192,
      "ttt.phase.prefix_docs": 4,
      "ttt.phase.chunk_tokens": 192,
      "hints.order": 3,
    },
  )
  run = folder / "run"
  assert stages.run(settings, run, ["train", "plain", "artifact", "ttt"]) == 0
  return RunFolder(run)

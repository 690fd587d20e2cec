"""What each process of test_two_processes_ttt.py runs: an evaluation that is saved after every batch."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from ttt_case import SETTINGS, changed, random_documents, random_params

from pgolf_jax.runtime import distributed
from pgolf_jax.runtime.distributed import data_mesh
from pgolf_jax.scoring import ttt

DATA = random_documents([30, 9, 75, 41, 22, 60, 14, 33, 51, 27, 18, 66, 38, 29, 45, 12])
SETTINGS = changed(SETTINGS, batch_size=8, phase__prefix_docs=8, lora__lr=1e-4)


def evaluate(folder: Path):
  return ttt.evaluate(SETTINGS, random_params(), DATA, data_mesh(), ttt.Options(folder=folder, save_seconds=0))


if __name__ == "__main__":
  distributed.start()
  found = evaluate(Path(sys.argv[1]))
  print(f"{found.score.bpb!r} bits per byte, {found.recompilations} compilations inside the clock")

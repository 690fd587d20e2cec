"""The kernels' benchmark measures what it says."""

import numpy as np

from pgolf_jax.bench import _kernel_cases
from pgolf_jax.bench.kernels import measure


def test_measures_every_pass_of_every_possible_implementation():
  rows, notes = measure(("leaky_relu2_mlp", "polar_express"), tokens=64, max_segment=32, repeats=1)
  measured = {(row.operation, row.passes) for row in rows if row.implementation == "xla"}
  assert measured == {("leaky_relu2_mlp", "fwd"), ("leaky_relu2_mlp", "fwd+bwd"), ("polar_express", "fwd")}
  assert all(row.seconds > 0 and row.flops_per_s > 0 for row in rows)
  assert not any(row.implementation == "mosaic_gpu" for row in rows)
  assert any("it needs a Hopper GPU" in note for note in notes)
  assert any("no peak known" in note for note in notes) and all(row.share is None for row in rows)


def test_segments_are_as_long_as_documents_and_never_longer_than_allowed():
  start = _kernel_cases.segment_starts(100_000, 2048)
  position = np.arange(100_000)
  assert start[0] == 0
  assert (np.diff(start) >= 0).all()
  assert (position - start < 2048).all()
  assert (start[start] == start).all()
  assert 500 < 100_000 / len(np.unique(start)) < 1300

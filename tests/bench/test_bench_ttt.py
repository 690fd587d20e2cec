"""The benchmark of test-time training counts and times what it says."""

from ttt_case import SETTINGS, changed, random_documents

from pgolf_jax.bench import harness, ttt


def test_measures():
  way = ttt.way(changed(SETTINGS, method="cached"), random_documents([30, 9, 75, 41, 22, 60]), "cached", 4)
  (measurement,), _ = harness.measure([way], 1, warmups=0)
  facts = measurement.facts
  assert way.work.amount == 9 + 22 + 41 + 75 - 1
  assert 0 < facts.one_shape_share <= facts.useful_share <= 1
  assert 0 < facts.outside_share < 1
  assert facts.flops_per_second > 0
  assert measurement.median > 0 and facts.compile_seconds > 0
  assert facts.shapes == 1

import dataclasses

import pytest

from pgolf_jax.settings import LengthStage, Settings, TrainConfig
from pgolf_jax.training import Schedule, lr_factor, muon_momentum

RECORD = Settings()


def schedule(**changes) -> Schedule:
  train = dataclasses.replace(RECORD.train, **changes)
  return Schedule(dataclasses.replace(RECORD, train=train))


def test_the_clock_of_the_record_is_596_seconds():
  s = schedule()
  assert s.time_cap == 596.0
  assert s.progress(0, 298.0) == 0.5


def test_sequence_length_and_looping_by_progress():
  s = schedule()
  shapes = [(s.plan(step, 596.0 * p).seq_len, s.plan(step, 596.0 * p).looping) for step, p in enumerate([0, 0.1, 0.11])]
  assert shapes == [(1024, False), (1024, False), (2048, False)]
  assert s.plan(4, 596 * 0.36).looping and s.plan(5, 596 * 0.71).seq_len == 3072


def test_warm_down():
  assert [lr_factor(RECORD.train, p, 0) for p in (0.0, 0.149, 0.575, 1.0)] == pytest.approx([1, 1, 0.5, 0.1])


def test_rewarming_after_a_change_of_length_counts_32_steps():
  s = schedule(schedule_mode="step", iterations=1000, max_wallclock_seconds=0.0)
  plans = [s.plan(step, 0.0) for step in range(140)]
  assert not any(p.seq_len_changed for p in plans[:101]) and plans[101].seq_len_changed
  assert plans[101].lr_scale == pytest.approx(1 / 32) and plans[132].lr_scale == 1.0
  assert plans[0].lr_scale == 1.0


def test_momentum_rises_over_1500_steps():
  assert [muon_momentum(RECORD.optimizer, k) for k in (0, 750, 1500, 9999)] == pytest.approx([0.92, 0.945, 0.97, 0.97])


def test_the_shapes_that_can_occur_are_those_that_do():
  s = schedule(schedule_mode="step", iterations=500)
  occurring = []
  walk = schedule(schedule_mode="step", iterations=500)
  for step in range(500):
    plan = walk.plan(step, 0.0)
    if (plan.seq_len, plan.looping) not in occurring:
      occurring.append((plan.seq_len, plan.looping))
  assert s.shapes() == occurring == [(1024, False), (2048, False), (2048, True), (3072, True)]


def test_a_restored_schedule_goes_on_alike():
  one = schedule(schedule_mode="step", iterations=300)
  plans = [one.plan(step, 0.0) for step in range(300)]
  for cut in (5, 31, 40, 120, 220):
    first = schedule(schedule_mode="step", iterations=300)
    for step in range(cut):
      first.plan(step, 0.0)
    second = schedule(schedule_mode="step", iterations=300)
    second.restore(first.state())
    assert [second.plan(step, 0.0) for step in range(cut, 300)] == plans[cut:]


def test_a_schedule_without_an_end_keeps_its_last_length():
  assert TrainConfig(seq_schedule=(LengthStage(64, 0.5),)).length_stages == ((64, 0.5), (64, 1.0))
  assert TrainConfig(seq_schedule=(), seq_len=8).length_stages == ((8, 1.0),)

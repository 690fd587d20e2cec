"""What the day on a card says of kernels: right ones pass, and each kind of fault has its verdict."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgolf_jax.bench import gpu_day_kernels as day
from pgolf_jax.bench.gpu_day import Day
from pgolf_jax.bench.kernels import cases, segment_starts

SIZES = day._TINY._replace(D=128)


def case(name: str = "leaky_relu2_mlp"):
  start = segment_starts(32, 16)[None]
  return next(c for c in cases(start, 16, jnp.float32, SIZES) if c.name == name)


def expected(one) -> list[np.ndarray]:
  return day._expected(Day(None, tiny=True), one, gradient=False)


def test_a_right_result_passes():
  row = day.check(case(), "reference", False, expected(case()), repeats=2)
  assert row["verdict"] == "ok" and row["error"] < 1e-6


def test_a_wrong_result_is_seen():
  one = case()
  wrong = dataclasses.replace(one, call=lambda *x, implementation: one.call(*x, implementation="xla").at[3].mul(1.5))
  row = day.check(wrong, "a kernel", False, expected(one), repeats=2)
  assert row["verdict"] == "WRONG" and row["error"] > 1e-2


def test_a_result_that_is_not_written_is_seen():
  one = case()
  holes = dataclasses.replace(
    one, call=lambda *x, implementation: one.call(*x, implementation="xla").at[-1, -1].set(jnp.nan)
  )
  assert day.check(holes, "a kernel", False, expected(one), repeats=2)["verdict"] == "NOT WRITTEN"


def test_a_result_that_changes_in_one_bit_is_a_race():
  one, counter = case(), itertools.count()

  def call(*x, implementation):
    y = one.call(*x, implementation="xla")
    noise = jax.pure_callback(lambda: np.float32(next(counter) == 2), jax.ShapeDtypeStruct((), jnp.float32))
    return y.at[0, 0].mul(1 + noise * 2.0**-22)

  row = day.check(dataclasses.replace(one, call=call), "a kernel", False, expected(one), repeats=3)
  assert row["verdict"] == "RACE" and row["note"] == "1 of 3 repetitions differ"


@pytest.mark.parametrize("operation", ["softcapped_xent", "leaky_relu2_mlp"])
def test_kernels_pass_in_the_interpreter(operation, interpret_tpu, monkeypatch):
  """The day's own item, with the kernels for TPUs that it takes there."""
  monkeypatch.setattr(day, "_TINY", SIZES)
  with interpret_tpu():
    rows = list(day.right(Day(None, tiny=True), operation))
  kernels = [row for row in rows if row["by"] == "mosaic_tpu"]
  assert len(kernels) == 6 and all(row["verdict"] == "ok" for row in kernels), kernels
  assert all(0 < row["error"] < row["limit"] for row in kernels)

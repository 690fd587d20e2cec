"""What the day on a card says of kernels: right ones pass, and each kind of fault has its verdict."""

import dataclasses
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgolf_jax.bench import gpu_day_kernels as day
from pgolf_jax.bench.gpu_day import Day
from pgolf_jax.bench.gpu_day_record import read_tuned
from pgolf_jax.bench.kernels import cases, segment_starts
from pgolf_jax.kernels.softcapped_xent import mosaic_tpu

SIZES = day._TINY


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


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nothing_is_right_beside_a_reference_that_is_not_finite(value):
  one = case()
  (whole,) = expected(one)
  for backend in ("a kernel", "xla"):
    row = day.check(
      dataclasses.replace(one, call=lambda *x, implementation: one.call(*x, implementation="xla")),
      backend,
      False,
      [whole.at[0, 0].set(value)],
      repeats=1,
    )
    assert row["verdict"] == "WRONG" and "not finite" in row["note"]


def test_a_result_that_changes_in_one_bit_is_a_race():
  one, counter = case(), itertools.count()

  def call(*x, implementation):
    y = one.call(*x, implementation="xla")
    noise = jax.pure_callback(lambda: np.float32(next(counter) == 2), jax.ShapeDtypeStruct((), jnp.float32))
    return y.at[0, 0].mul(1 + noise * 2.0**-22)

  row = day.check(dataclasses.replace(one, call=call), "a kernel", False, expected(one), repeats=3)
  assert row["verdict"] == "RACE" and row["note"] == "1 of 3 repetitions differ"


@pytest.mark.parametrize("operation", [pytest.param("softcapped_xent", marks=pytest.mark.slow), "leaky_relu2_mlp"])
def test_kernels_pass_in_the_interpreter(operation, interpret_tpu):
  """The day's own item, with the kernels for TPUs that it takes there."""
  with interpret_tpu():
    rows = list(day.right(Day(None, tiny=True), operation))
  kernels = [row for row in rows if row["by"] == "mosaic_tpu"]
  assert len(kernels) == 6 and all(row["verdict"] == "ok" for row in kernels), kernels
  assert all(0 < row["error"] < row["limit"] for row in kernels)


def test_sizes_that_may_be_tried_begin_with_the_kernels_own():
  for (operation, backend), choices in day.TUNABLE.items():
    module = importlib.import_module(f"pgolf_jax.kernels.{operation}.{backend}")
    assert {name: getattr(module, name) for name in choices} == {name: values[0] for name, values in choices.items()}


def test_the_best_block_sizes_come_into_the_table(interpret_tpu, monkeypatch, tmp_path):
  """The sizes reach the kernel, results stay the same, and the kernel has its own again afterwards."""
  monkeypatch.setattr(day, "TUNABLE", {("softcapped_xent", "mosaic_tpu"): {"_ROWS": (256, 32)}})
  seen = []

  def timed(way, _, config, **more):
    way.prepare()()
    seen.append(mosaic_tpu._ROWS)
    yield {"config": config, "ms": 2.0 / len(seen), "p10": 0.1, "p90": 1.1 / len(seen), **more}

  monkeypatch.setattr(day, "timed", timed)
  with interpret_tpu():
    rows = list(day.tune(Day(tmp_path, tiny=True)))
  assert seen == [256, 32] and mosaic_tpu._ROWS == 256
  assert [row["verdict"] for row in rows] == ["in the table"] * 2
  (entry,) = read_tuned(tmp_path / "tuned.json")["TPU v5 lite"]["softcapped_xent.mosaic_tpu"].values()
  assert entry["sizes"] == {"_ROWS": 32} and entry["ms"] == 1.0 and entry["commit"]

"""How adapters move: each optimizer by its formula, and rows that sit out steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgolf_jax.model.adapters import Adapter
from pgolf_jax.scoring.adapters import Rule, begin, settle, update
from pgolf_jax.settings import LoRAConfig, TTTConfig

LR, DECAY = 0.01, 0.5


def rule(**lora) -> Rule:
  config = dataclasses.replace(LoRAConfig(rank=2, lr=LR, lr_mult=1.0, weight_decay=DECAY), **lora)
  return Rule.choose(TTTConfig(lora=config), short=False)


def arrays(seed: int) -> dict[str, Adapter]:
  rng = np.random.default_rng(seed)
  A, B = (jnp.asarray(rng.normal(0, 1, shape), jnp.float32) for shape in ((3, 2, 5), (3, 2, 4)))
  return {"o": Adapter(A, B)}


def steps_of(name: str, grads: list[np.ndarray], p: np.ndarray) -> np.ndarray:
  """Where a parameter comes to, in NumPy."""
  square, momentum = np.zeros_like(p), np.zeros_like(p)
  for t, g in enumerate(grads, 1):
    if name == "adam":
      square = 0.99 * square + 0.01 * g**2
      p = p - LR * (g / (np.sqrt(square / (1 - 0.99**t)) + 1e-10) + DECAY * p)
    else:
      momentum = 0.9 * momentum + g + DECAY * p
      p = p - LR * momentum
  return p


@pytest.mark.parametrize(("name", "beta1"), [("adam", 0.0), ("sgd", 0.9)])
def test_optimizers_by_their_formulas(name, beta1):
  how, grads = rule(optimizer=name, beta1=beta1), [arrays(seed) for seed in (1, 2, 3)]
  learner = begin(how, arrays(0))
  for each in grads:
    learner = update(how, learner, each)
  for part in ("A", "B"):
    start, moved = (np.asarray(getattr(x["o"], part)) for x in (arrays(0), learner.adapters))
    expected = steps_of(name, [np.asarray(getattr(g["o"], part)) for g in grads], start)
    np.testing.assert_allclose(moved, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "beta1"), [("adam", 0.0), ("adam", 0.9), ("sgd", 0.9)])
def test_rows_that_sat_out_come_to_where_gradients_of_zero_would_have_taken_them(name, beta1):
  how, took = rule(optimizer=name, beta1=beta1), jnp.array([3, 1, 2])

  def grads(step: int) -> dict[str, Adapter]:
    return jax.tree.map(lambda x: jnp.where(works(step), x, 0.0), arrays(step + 1))

  def works(step: int):
    return (took > step)[:, None, None]

  everything = left_out = begin(how, arrays(0))
  after = [everything.adapters["o"]]
  for step in range(3):
    everything = update(how, everything, grads(step))
    after.append(everything.adapters["o"])
    moved = update(how, left_out, grads(step))
    left_out = jax.tree.map(
      lambda new, old, i=step: jnp.where(works(i), new, old) if new.ndim else new, moved, left_out
    )
  total = jnp.array([3, 2, 3])  # the row in the middle is of a batch that ended before
  settled = settle(how, left_out, took, total)
  for part in ("A", "B"):
    expected = np.stack([getattr(after[end], part)[row] for row, end in enumerate(total.tolist())])
    np.testing.assert_allclose(getattr(settled["o"], part), expected, rtol=2e-5, atol=1e-6, err_msg=part)

"""Runs that differ in numbers alone share one set of programs, and each still trains with its own numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_resume import SETTINGS, data  # noqa: F401

from pgolf_jax.run_folder import RunFolder, read_metrics
from pgolf_jax.runtime.clock import compilations
from pgolf_jax.runtime.distributed import data_mesh
from pgolf_jax.settings import LengthStage, ScaleStage
from pgolf_jax.settings.load import changed, flattened
from pgolf_jax.training.loop import Trainer
from pgolf_jax.training.optimizer import Hyper, scale_by_adam
from pgolf_jax.training.step import TrainStep, forget_programs, structure

NUMBERS = {
  "optimizer.matrix_lr": 0.05,
  "optimizer.muon_wd": 0.3,
  "optimizer.muon_momentum": 0.9,
  "optimizer.muon_momentum_warmup_start": 0.7,
  "optimizer.muon_momentum_warmup_steps": 3,
  "optimizer.embed_lr": 0.07,
  "optimizer.embed_wd": 0.2,
  "optimizer.scalar_lr": 0.04,
  "optimizer.adam_wd": 0.3,
  "optimizer.beta1": 0.8,
  "optimizer.beta2": 0.95,
  "optimizer.adam_eps": 1e-6,
  "optimizer.grad_clip_norm": 0.0,
  "train.ema_decay": 0.7,
  "train.average_share": 0.5,
  "train.warmdown_frac": 0.3,
  "train.warmdown_iters": 2,
  "train.min_lr": 0.3,
  "train.seq_change_warmup_steps": 1,
  "train.iterations": 5,
  "train.midrun_cap_schedule": (ScaleStage(0.5, 0.5),),
  "model.qk_gain_init": 2.0,
  "model.tied_embed_init_std": 0.2,
  "seed": 7,
}
"""Every number of training that changes no program, each at a value that is not the others'."""

ONE = changed(SETTINGS, {"train.seq_schedule": (LengthStage(16, 1.0),), "train.iterations": 4})


@pytest.fixture(scope="module")
def mesh():
  return data_mesh(jax.devices()[:1])


def test_no_number_of_a_sweep_is_written_into_the_program(mesh):
  other = changed(ONE, NUMBERS)
  assert not any(flattened(other)[name] == flattened(ONE)[name] for name in NUMBERS)
  texts = {TrainStep(settings, mesh).lower(16, looping=False).as_text() for settings in (ONE, other, structure(ONE))}
  assert len(texts) == 1


@pytest.mark.parametrize("name, value", [
  ("model.logit_softcap", 20.0), ("optimizer.muon_steps", 3), ("train.batch_tokens", 1024),
  ("optimizer.muon_column_normalize", True), ("optimizer.muon_heads", 1),
])  # fmt: skip
def test_what_a_program_is_made_from_is_not_shared(mesh, name, value):
  assert structure(changed(ONE, {name: value})) != structure(ONE)


def test_a_sweep_compiles_once(tmp_path, data, mesh):  # noqa: F811
  """Two programs, which two threads compile at once."""
  two_lengths = changed(ONE, {"train.seq_schedule": (LengthStage(16, 0.4), LengthStage(32, 1.0))})
  forget_programs()
  losses, counts = [], []
  # The first values are drawn by a program of their own, and average and last weights are mixed by another.
  others = ("model.tied_embed_init_std", "model.qk_gain_init", "train.average_share")
  numbers = {name: value for name, value in NUMBERS.items() if name not in others}
  for number, changes in enumerate([{}, numbers, {"optimizer.matrix_lr": 0.05}]):
    run = RunFolder(tmp_path / str(number), changed(two_lengths, changes))
    before = compilations()
    state, result = Trainer(run, mesh, data).train()
    jax.block_until_ready(state)
    counts.append(compilations() - before)
    losses.append([line["loss"] for line in read_metrics(run.metrics)])
    assert result["recompilations_in_clock"] == 0
  assert counts[0] > 0 and counts[1:] == [0, 0]
  assert losses[0][0] == losses[2][0] and losses[0][0] != losses[1][0]
  assert losses[0][2:] != losses[2][2:]


def test_adam_is_that_of_optax_to_the_bit():
  rng = np.random.default_rng(0)
  config = dataclasses.replace(SETTINGS.optimizer, beta1=0.9, beta2=0.99, adam_eps=1e-8)
  ours, theirs = scale_by_adam(), optax.scale_by_adam(0.9, 0.99, 1e-8)
  params = {"a": jnp.zeros((5, 7)), "b": jnp.zeros(3)}
  states = ours.init(params), theirs.init(params)
  our_update = jax.jit(lambda g, s, hyper: ours.update(g, s, hyper=hyper))
  for _ in range(5):
    grads = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), jnp.float32), params)
    a, first = our_update(grads, states[0], Hyper.of(config))
    b, second = jax.jit(theirs.update)(grads, states[1])
    states = first, second
    for x, y in zip(jax.tree.leaves((a, first)), jax.tree.leaves((b, second)), strict=True):
      np.testing.assert_array_equal(x, y)

"""Tuning: weights that are not rounded yet learn to make up for the errors of those that are (docs/quantizer.md).

What they learn is the float model's own distribution of every next token of training text, by Adam. Incremental
quantisation, Zhou et al. (2017), arXiv 1702.03044, with the float model as the teacher.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pgolf_jax.data.shards import list_shards
from pgolf_jax.model.params import Params
from pgolf_jax.quantize.artifact.tensors import BANKS, names_in, unbank
from pgolf_jax.quantize.calibrate import NO_ROW, batch_rows, draw_rows, place_rows
from pgolf_jax.quantize.rate import STAGES
from pgolf_jax.runtime.distributed import AXIS, data_mesh, replicated
from pgolf_jax.runtime.log import log, progress
from pgolf_jax.scoring.plain import divergence, row_divergence
from pgolf_jax.settings import ModelConfig, Settings

_ADAM = optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-12)
_RATE = 0.02  # of a parameter's rounding error, at the first step; it falls linearly to 0
_SEED = 1  # beside the run's: other rows than calibration's


class Tuner:
  """Tunes weights of one model towards what it was.

  Args:
    settings: of the model, the batches of calibration and the seed.
    params: the float model, fp32, under bank names.
    data: folder with the training shards.
  """

  def __init__(self, settings: Settings, params: Mapping[str, np.ndarray], data: Path):
    self._settings, self._params, self._mesh = settings, dict(params), data_mesh()
    self._shards = list_shards(data, "train")

  @functools.cached_property
  def _teacher(self) -> Params:
    """The float model on the devices, where it is wanted."""
    return jax.device_put(self._params, replicated(self._mesh))

  def _rows(self, batches: int, stage: int) -> np.ndarray:
    """[batch, row, position]: training text, another at every stage."""
    length, rows = self._settings.train.seq_len, batch_rows(self._settings)
    seed = (self._settings.seed, _SEED, stage)
    drawn = draw_rows(self._shards, seq_len=length, count=batches * rows, seed=seed)
    return drawn.reshape(batches, rows, length)

  @functools.cached_property
  def _held(self) -> np.ndarray:
    """Rows that weights are compared on and not tuned on."""
    return self._rows(1, stage=len(STAGES))[0]

  def divergence(self, weights: Mapping[str, np.ndarray]) -> float:
    """Returns KL(float model ‖ weights), nats a token of a batch of training text; weights as for `tune`."""
    return self._divergence(self._on_devices(weights))

  def _divergence(self, params: Params) -> float:
    return divergence(self._settings, self._teacher, params, self._held, self._mesh)

  def _on_devices(self, weights: Mapping[str, Any], *, dims: int = 0) -> Params:
    banked = _banked(weights, self._settings.model.num_layers, dims=dims)
    return jax.device_put(banked, replicated(self._mesh))

  def tune(
    self, weights: Mapping[str, np.ndarray], error: Mapping[str, float], *, steps: int, stage: int
  ) -> Mapping[str, np.ndarray]:
    """Returns the weights after some steps, or as they are if those made them worse on text that was not learnt from.

    Args:
      weights: all parameters by name, banks taken apart.
      error: of each that may change, the root mean square of what rounding will do to it: the unit of its steps.
      steps: batches as large as calibration's.
      stage: 0, 1, …; each reads other text.
    """
    mesh = self._mesh
    step = _program(self._settings.model, self._settings.train.compute_dtype, mesh)
    params = self._on_devices(weights)
    before = self._divergence(params)
    rates = self._on_devices({name: np.float32(error.get(name, 0.0)) for name in weights}, dims=2)
    state = params, jax.device_put(_ADAM.init(params), replicated(mesh))
    with progress("tuning", total=steps, unit="steps") as bar:
      for done, rows_BxT in enumerate(self._rows(steps, stage)):
        batch = place_rows(mesh, rows_BxT, -(-len(rows_BxT) // mesh.size) * mesh.size)
        factor = np.float32(_RATE * (1 - done / steps))
        state = step(state, self._teacher, rates, factor, batch)
        jax.block_until_ready(state)
        bar.advance()
    params = state[0]
    after = self._divergence(params)
    log.info("tuning: %.6f nats a token from the float model, %.6f before", after, before)
    return unbank(jax.tree.map(np.asarray, params)) if after < before else weights


def _banked(by_name: Mapping[str, Any], layers: int, *, dims: int = 0) -> Params:
  """Stacks the matrices of each bank; `dims` axes of size 1 come after that of the stack."""
  banked = dict(by_name)
  for bank in BANKS:
    stack = np.stack([banked.pop(name) for name in names_in(bank, layers)])
    banked[bank] = stack.reshape(*stack.shape, *[1] * dims)
  return banked


@functools.lru_cache(maxsize=2)
def _program(config: ModelConfig, dtype: str, mesh: Mesh):
  """(parameters and Adam's moments, teacher, rates, factor on them, (rows, their numbers)) → parameters and moments."""

  def device_gradient(params: Params, teacher: Params, batch: tuple[jax.Array, jax.Array]) -> Params:
    def loss(params, tokens_T, number):
      return jnp.where(number == NO_ROW, 0.0, row_divergence(config, dtype, teacher, params, tokens_T[None])[0])

    def add(total, row):
      return jax.tree.map(jnp.add, total, jax.grad(loss)(params, *row)), None

    return jax.lax.psum(jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), batch)[0], AXIS)

  gradient = jax.shard_map(device_gradient, mesh=mesh, in_specs=(P(), P(), P(AXIS)), out_specs=P(), check_vma=False)

  def step(state, teacher, rates, factor, batch):
    params, moments = state
    direction, moments = _ADAM.update(gradient(params, teacher, batch), moments)
    return jax.tree.map(lambda w, d, rate: w - factor * rate * d, params, direction, rates), moments

  return jax.jit(step, donate_argnums=0, out_shardings=replicated(mesh))

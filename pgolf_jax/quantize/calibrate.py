"""Calibration: the second moments of every matrix's inputs, which the quantiser weighs errors by (recipe section 4).

They are collected by the model's own forward pass, over rows from random places of the training shards. Letters: B rows
and T positions as in the model, N inputs of a matrix.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from pgolf_jax.data.shards import list_shards, read_shard
from pgolf_jax.errors import UserError
from pgolf_jax.model import packed, segments
from pgolf_jax.model.gpt import bind
from pgolf_jax.model.params import Params
from pgolf_jax.runtime.distributed import AXIS, data_mesh, place, replicated
from pgolf_jax.runtime.log import progress
from pgolf_jax.settings import Settings

_STEP_TOKENS = 16_384  # that a device takes at a time


class Calibration(NamedTuple):
  """Moments by matrix name; query, key and value of a layer share theirs, each under its own name."""

  hessian: dict[str, Float[np.ndarray, "N N"]]  # Σ xxᵀ over all positions, divided by the number of batches
  act_rms: dict[str, Float[np.ndarray, " N"]]  # root mean square of each input


class _Moments(NamedTuple):
  """Sums over the inputs x of one matrix."""

  gram_NxN: Float[Array, "N N"]  # Σ xxᵀ
  square_N: Float[Array, " N"]  # Σ x²
  inputs: Int[Array, ""]


def calibrate(settings: Settings, params: Params, data: Path, *, world: int) -> Calibration:
  """Returns the moments that the settings ask for, over rows of the training shards in `data`.

  Args:
    world: ranks of the run. With `calibration_scope` "rank0", only the shards that rank 0 would draw from are used,
      and only its number of rows.

  Raises:
    UserError: no shard is as long as a row.
  """
  return moments(settings, params, calibration_rows(settings, data, world=world, length=settings.train.seq_len))


def calibration_rows(settings: Settings, data: Path, *, world: int, length: int) -> Int[np.ndarray, "B T"]:
  """Returns the rows of `length` tokens that calibration reads; arguments and errors as in `calibrate`."""
  shards = list_shards(data, "train")
  if settings.quantize.calibration_scope == "rank0":
    shards = shards[::world]
  return draw_rows(shards, seq_len=length, count=row_count(settings, world), seed=settings.seed)


def row_count(settings: Settings, world: int) -> int:
  """Returns the number of rows: `calibration_batches` micro-batches for each rank that takes part."""
  ranks = world if settings.quantize.calibration_scope == "all" else 1
  return settings.quantize.calibration_batches * batch_rows(settings) * ranks


def batch_rows(settings: Settings) -> int:
  """Returns the number of rows of a calibration batch, at least one."""
  tokens = settings.train.batch_tokens // settings.quantize.calibration_micro_batches
  return max(1, tokens // settings.train.seq_len)


def draw_rows(shards: Sequence[Path], *, seq_len: int, count: int, seed: int | Sequence[int]) -> Int[np.ndarray, "B T"]:
  """Returns `count` rows of `seq_len` tokens from random places of the shards.

  Every shard is cut into rows from a random first token on. Rows are drawn from all of them without repetition; once
  all have been drawn, the shards are cut again from new first tokens.

  Raises:
    UserError: no shard holds as many tokens as a row.
  """
  rng = np.random.default_rng(seed)
  tokens = [read_shard(path) for path in shards]
  rows: list[np.ndarray] = []
  while len(rows) < count:
    places = []
    for shard, values in enumerate(tokens):
      phase = int(rng.integers(min(seq_len, max(len(values) - seq_len, 0) + 1)))
      places += [(shard, start) for start in range(phase, len(values) - seq_len + 1, seq_len)]
    if not places:
      raise UserError(
        f"Calibration needs rows of {seq_len} tokens, but the longest training shard has {max(map(len, tokens))}; "
        "lower train.seq_len or prepare more data."
      )
    drawn = rng.permutation(len(places))[: count - len(rows)]
    rows += [tokens[shard][start : start + seq_len] for shard, start in map(places.__getitem__, drawn)]
  return np.stack(rows).astype(np.int32)


def moments(
  settings: Settings, params: Params, rows_BxT: Int[np.ndarray, "B T"], *, step_tokens: int = _STEP_TOKENS
) -> Calibration:
  """Returns the second moments of every matrix's inputs over the rows, with looping, summed in fp32 over all devices.

  A layer that runs several times adds up all its uses. Hessians are divided by `calibration_batches`, which has no
  effect on the integers. With `calibration_respect_documents` attention stays within a document, otherwise a row is one
  segment, as in the reference.

  Args:
    step_tokens: tokens that a device takes at a time.
  """
  length = rows_BxT.shape[1]
  form = {"looping": True, "dtype": jnp.dtype(settings.train.compute_dtype)}

  def device_moments(params, tokens_BxT, number_B) -> dict[str, _Moments]:
    is_row_B = number_B != NO_ROW

    def collect(name: str, x_BxTxN: jax.Array) -> _Moments:
      del name
      x = (x_BxTxN * is_row_B[:, None, None].astype(x_BxTxN.dtype)).reshape(-1, x_BxTxN.shape[-1])
      gram_NxN = jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
      square_N = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=0)
      return _Moments(gram_NxN, square_N, jnp.sum(is_row_B.astype(jnp.int32)) * length)

    if settings.quantize.calibration_respect_documents:
      context = packed(tokens_BxT, bos_id=settings.model.bos_id, seq_len=length, **form)
    else:
      context = segments(jnp.zeros_like(tokens_BxT), max_segment=length, **form)
    return bind(settings.model, params)(tokens_BxT, context, collect=collect).collected

  total = sum_over_rows(device_moments, params, rows_BxT, device_rows=step_tokens // length, doing="calibrating")
  return _calibration(total, settings.quantize.calibration_batches)


NO_ROW = -1
"""Number of a row that only fills a step."""


def sum_over_rows(
  device_sums: Callable[[Params, jax.Array, jax.Array], Any],
  params: Mapping[str, np.ndarray],
  rows_BxT: Int[np.ndarray, "B T"],
  *,
  device_rows: int,
  doing: str,
) -> Any:
  """Returns a tree of sums over rows of text, over all devices, in the types of its parts.

  Args:
    device_sums: (params, rows [B, T], their numbers [B]) → the sums over a device's rows, `NO_ROW` among them.
    device_rows: most rows that a device takes at a time.
    doing: what the progress bar says.
  """
  count, length = rows_BxT.shape
  mesh = data_mesh()
  step_rows = mesh.size * max(1, min(device_rows, math.ceil(count / mesh.size)))
  summed = jax.shard_map(
    lambda *arguments: jax.lax.psum(device_sums(*arguments), AXIS),
    mesh=mesh,
    in_specs=(P(), P(AXIS), P(AXIS)),
    out_specs=P(),
    check_vma=False,
  )
  step = jax.jit(lambda total, *arguments: jax.tree.map(jnp.add, total, summed(*arguments)), donate_argnames=("total",))
  params = jax.device_put(dict(params), replicated(mesh))
  example = (jax.ShapeDtypeStruct((step_rows, length), jnp.int32), jax.ShapeDtypeStruct((step_rows,), jnp.int32))
  total = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(summed, params, *example))
  with progress(doing, total=count, unit="rows") as bar:
    for first in range(0, count, step_rows):
      taken = rows_BxT[first : first + step_rows]
      total = step(total, params, *place_rows(mesh, taken, step_rows, first=first))
      jax.block_until_ready(total)
      bar.advance(len(taken))
  return total


def place_rows(
  mesh: Mesh, rows_BxT: Int[np.ndarray, "B T"], count: int, *, first: int = 0
) -> tuple[Int[Array, "C T"], Int[Array, " C"]]:
  """Returns rows and their numbers, shared out over the devices and filled up with `NO_ROW`.

  Args:
    count: C, a multiple of the devices.
    first: number of the first row.
  """
  tokens_CxT = np.zeros((count, rows_BxT.shape[1]), np.int32)
  tokens_CxT[: len(rows_BxT)] = rows_BxT
  place_C = np.arange(count)
  number_C = np.where(place_C < len(rows_BxT), first + place_C, NO_ROW).astype(np.int32)
  return place(mesh, tokens_CxT, P(AXIS)), place(mesh, number_C, P(AXIS))


def _calibration(total: dict[str, _Moments], batches: int) -> Calibration:
  hessian = {name: np.asarray(m.gram_NxN) / np.float32(batches) for name, m in total.items()}
  act_rms = {name: np.sqrt(np.asarray(m.square_N) / np.float32(m.inputs)) for name, m in total.items()}
  for moment in (hessian, act_rms):
    for name in [n for n in moment if n.endswith("attn.c_q.weight")]:
      for other in ("c_k", "c_v"):
        moment[name.replace("c_q", other)] = moment[name]
  return Calibration(hessian, act_rms)

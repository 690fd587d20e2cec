"""What the quantiser must know of the data: the second moments of every matrix's inputs (recipe section 4).

Through the one forward pass, over rows from random places of the training shards. Shape letters: R rows, B rows of one
step, T positions, N inputs of a matrix.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from pgolf_jax.data.shards import read_shard
from pgolf_jax.errors import UserError
from pgolf_jax.model.context import packed, segments
from pgolf_jax.model.gpt import bind
from pgolf_jax.model.params import Params
from pgolf_jax.runtime.progress import progress
from pgolf_jax.settings.config import ModelConfig, Settings


@dataclasses.dataclass(frozen=True)
class Calibration:
  """By matrix name; query, key and value of a layer share theirs, each under its own name."""

  hessian: dict[str, Float[np.ndarray, "N N"]]  # Σ xxᵀ over all positions, divided by the number of batches
  act_rms: dict[str, Float[np.ndarray, " N"]]  # root mean square of each input


def row_count(settings: Settings, world: int) -> int:
  """Rows that the settings ask for: `calibration_batches` micro-batches for each rank that takes part."""
  per_batch = settings.train.batch_tokens // settings.quantize.calibration_micro_batches // settings.train.seq_len
  ranks = world if settings.quantize.calibration_scope == "all" else 1
  return settings.quantize.calibration_batches * max(per_batch, 1) * ranks


def draw_rows(shards: Sequence[Path], *, seq_len: int, count: int, seed: int) -> Int[np.ndarray, "R T"]:
  """`count` rows of `seq_len` tokens from random places of the shards.

  Every shard is cut into rows from a random first token on; rows are drawn from all of them without repetition, and
  over again, with new first tokens, once all have been drawn.

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


def calibrate(
  config: ModelConfig,
  params: Params,
  rows_RxT: Int[np.ndarray, "R T"],
  *,
  batches: int,
  respect_documents: bool,
  dtype=jnp.bfloat16,
  step_tokens: int = 16_384,
) -> Calibration:
  """Second moments of every matrix's inputs over the rows, looping on, summed in fp32 over all devices.

  A layer that runs several times adds up all its uses.

  Args:
    batches: what the Hessians are divided by (their size has no effect on the integers).
    respect_documents: confine attention to documents; else each row is one segment, as in the reference.
    dtype: of the forward pass.
    step_tokens: tokens that a device takes at a time.
  """
  count, length = rows_RxT.shape
  mesh = Mesh(np.array(jax.devices()), ("data",))
  per_device = max(1, min(step_tokens // length, math.ceil(count / mesh.size)))
  step_rows = per_device * mesh.size
  by_row = NamedSharding(mesh, PartitionSpec("data"))

  def moments(params, tokens_BxT, weight_B):
    """Returns, by matrix name, Σ w·xxᵀ, Σ w·x² and the number of inputs x with w = 1."""

    def collect(name: str, x_BxTxN: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
      del name
      x_KxN = (x_BxTxN * weight_B[:, None, None].astype(x_BxTxN.dtype)).reshape(-1, x_BxTxN.shape[-1])
      gram_NxN = jnp.matmul(x_KxN.T, x_KxN, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
      square_N = jnp.sum(jnp.square(x_KxN.astype(jnp.float32)), axis=0)
      return gram_NxN, square_N, jnp.sum(weight_B.astype(jnp.int32)) * length

    if respect_documents:
      context = packed(tokens_BxT, bos_id=config.bos_id, seq_len=length, looping=True, dtype=dtype)
    else:
      context = segments(jnp.zeros_like(tokens_BxT), max_segment=length, looping=True, dtype=dtype)
    return bind(config, params)(tokens_BxT, context, collect=collect).collected

  replicated = PartitionSpec()
  summed = jax.shard_map(
    lambda *arguments: jax.lax.psum(moments(*arguments), "data"),
    mesh=mesh,
    in_specs=(replicated, PartitionSpec("data"), PartitionSpec("data")),
    out_specs=replicated,
    check_vma=False,
  )
  step = jax.jit(lambda total, *arguments: jax.tree.map(jnp.add, total, summed(*arguments)), donate_argnames=("total",))

  params = jax.device_put(params, NamedSharding(mesh, replicated))
  example = (jax.ShapeDtypeStruct((step_rows, length), jnp.int32), jax.ShapeDtypeStruct((step_rows,), jnp.float32))
  total = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(summed, params, *example))
  with progress("calibrating", total=count, unit="rows") as bar:
    for first in range(0, count, step_rows):
      taken = rows_RxT[first : first + step_rows]
      tokens_BxT = np.zeros((step_rows, length), np.int32)
      tokens_BxT[: len(taken)] = taken
      weight_B = (np.arange(step_rows) < len(taken)).astype(np.float32)
      arrays = [
        jax.make_array_from_callback(value.shape, by_row, value.__getitem__) for value in (tokens_BxT, weight_B)
      ]
      total = step(total, params, *arrays)
      jax.block_until_ready(total)
      bar.advance(len(taken))

  hessian = {name: np.asarray(gram) / np.float32(batches) for name, (gram, _, _) in total.items()}
  act_rms = {name: np.sqrt(np.asarray(square) / np.float32(inputs)) for name, (_, square, inputs) in total.items()}
  for moment in (hessian, act_rms):
    for name in [n for n in moment if n.endswith("attn.c_q.weight")]:
      for other in ("c_k", "c_v"):
        moment[name.replace("c_q", other)] = moment[name]
  return Calibration(hessian, act_rms)

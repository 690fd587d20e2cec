"""The accelerated operations at a size of choice: their arguments, the work in them, their implementations."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pgolf_jax.kernels import Choice
from pgolf_jax.kernels.leaky_relu2_mlp import api as mlp
from pgolf_jax.kernels.polar_express import api as polar
from pgolf_jax.kernels.segment_attention import api as attention
from pgolf_jax.kernels.softcapped_xent import api as xent
from pgolf_jax.kernels.softcapped_xent import linear

D, F, V, H, K, C = 512, 2048, 8192, 8, 4, 64
"""The record's sizes."""
CAPS = {"cap_pos": 30.0, "cap_neg": 30.0}
SLOPE = 0.3
MEAN_DOCUMENT = 957
"""Tokens of a validation document, on average."""


@dataclasses.dataclass(frozen=True)
class Case:
  """One operation on one set of arguments.

  Attributes:
    name: the operation, as in pgolf_jax.kernels.
    arguments: arrays; those in `differentiated` (by position) get a gradient.
    call: (implementation, *arguments) → result.
    choose: implementation → Choice, raising ValueError where it is not possible.
    flops, num_bytes: of the forward pass, and of forward and gradient: products that the operation needs (what an
      implementation does twice counts once), arrays that it must read or write.
  """

  name: str
  arguments: tuple[jax.Array, ...]
  call: Callable[..., jax.Array]
  choose: Callable[[str], Choice]
  flops: tuple[float, float]
  num_bytes: tuple[float, float]
  differentiated: tuple[int, ...] = (0,)


def segment_starts(tokens: int, max_segment: int) -> np.ndarray:
  """Starts of segments as long as documents are: exponential about their mean, cut at `max_segment`."""
  lengths = np.random.default_rng(0).exponential(MEAN_DOCUMENT, size=2 + 4 * tokens // MEAN_DOCUMENT)
  begins = np.cumsum(1 + lengths.astype(int))
  position = np.arange(tokens)
  document = np.concatenate([[0], begins])[np.searchsorted(begins, position, side="right")]
  return (position - (position - document) % max_segment).astype(np.int32)


def cases(tokens: int, max_segment: int, matrices: int, dtype) -> list[Case]:
  """All operations on `tokens` tokens and a bank of `matrices`, in the order in which a step meets them."""
  keys = iter(jax.random.split(jax.random.key(0), 16))
  size = jnp.dtype(dtype).itemsize

  def normal(*shape, scale=1.0):
    return (scale * jax.random.normal(next(keys), shape)).astype(dtype)

  q, k, v = normal(1, tokens, H, C), normal(1, tokens, K, C), normal(1, tokens, K, C)
  start = segment_starts(tokens, max_segment)
  pairs = float((np.arange(tokens) - start + 1).sum())
  attend_bytes = size * tokens * C * (2 * H + 2 * K)
  x, up, down = normal(tokens, D), normal(F, D, scale=D**-0.5), normal(D, F, scale=F**-0.5)
  mlp_bytes = size * (2 * tokens * D + 2 * D * F)
  z, y_N = normal(tokens, V, scale=5.0), jax.random.randint(next(keys), (tokens,), 0, V)
  weight = normal(V, D, scale=0.05)
  size_of_block = linear.block_size(tokens, V)
  block = jax.ShapeDtypeStruct((size_of_block, V), dtype), jax.ShapeDtypeStruct((size_of_block,), y_N.dtype)
  head_bytes = size * (tokens * D + V * D)
  bank = normal(matrices, D, F)
  orthogonalise = 5 * matrices * (4 * D * D * F + 2 * D**3)

  return [
    Case(
      "segment_attention",
      (q, k, v, jnp.asarray(start)[None]),
      partial(_named, partial(attention.segment_attention, max_segment=max_segment)),
      lambda name: attention.OPERATION.choose(q, k, v, start[None], max_segment=max_segment, implementation=name),
      (4 * pairs * H * C, 14 * pairs * H * C),
      (attend_bytes, 3 * attend_bytes),
      (0, 1, 2),
    ),
    Case(
      "leaky_relu2_mlp",
      (x, up, down),
      partial(_named, partial(mlp.leaky_relu2_mlp, slope=SLOPE)),
      lambda name: mlp.OPERATION.choose(x, up, down, slope=SLOPE, implementation=name),
      (4 * tokens * D * F, 12 * tokens * D * F),
      (mlp_bytes, 3 * mlp_bytes),
      (0, 1, 2),
    ),
    Case(
      "softcapped_xent",
      (z, y_N),
      partial(_named, partial(xent.softcapped_xent, **CAPS)),
      lambda name: xent.OPERATION.choose(z, y_N, None, **CAPS, implementation=name),
      (0, 0),
      (size * z.size, 3 * size * z.size),
    ),
    Case(
      "linear_softcapped_xent",
      (x, weight, y_N),
      partial(_named, partial(xent.linear_softcapped_xent, **CAPS)),
      lambda name: xent.OPERATION.choose(*block, None, **CAPS, implementation=name),
      (2 * tokens * D * V, 6 * tokens * D * V),
      (head_bytes, 3 * head_bytes),
      (0, 1),
    ),
    Case(
      "polar_express",
      (bank,),
      partial(_named, polar.polar_express),
      lambda name: polar.OPERATION.choose(bank, steps=5, implementation=name),
      (orthogonalise, 0),
      (2 * size * bank.size, 0),
      (),
    ),
  ]


def _named(f, implementation: str, *arguments):
  return f(*arguments, implementation=implementation)

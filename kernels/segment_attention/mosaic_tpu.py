"""Segment-confined attention for TPUs, forward and backward, in Pallas' Mosaic TPU.

A block of queries walks over the blocks of keys from itself back to its first query's segment start, so that the work
grows with the length of segments and not with T. How far that is stands in scalars that the chip has before the blocks;
what lies beyond is neither fetched nor computed. Kernels are compiled for the longest walk that `max_segment` allows.

Heads stay side by side along lanes, [T, H·C], as the product before leaves them: an axis of 64 would fill half of each
tile. A step takes as many key heads as fill the lanes and all query heads that they serve. Scores stand with a key in
each row of sublanes and a query in each lane, so that a query's start, maximum and sum are rows.

One kernel computes the gradient, by keys. A block of queries is complete when the walk reaches the keys at its own
place; until then its gradient waits in VMEM, in a ring as long as the walk. Every sum has one order.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pgolf_jax.kernels import hardware
from pgolf_jax.kernels.segment_attention import padded_starts, without_lone_queries

_LANES = 128
_BLOCK = 256
"""Queries, or keys, in a block; fewer where no segment is as long."""


def _vmem_bytes() -> int:
  """Returns the bytes of VMEM that a kernel may take: all that a chip up to TPU v4 has, else more than 16 MiB."""
  return (16 if hardware.target().kind.startswith(("TPU v2", "TPU v3", "TPU v4")) else 48) << 20


def obstacle(q_BxTxHxC, k_BxTxKxC, v_BxTxKxC, start_BxT, *, max_segment: int) -> str | None:
  """Returns why this backend cannot compute the operation for these shapes and types, or None."""
  if q_BxTxHxC.dtype not in (jnp.bfloat16, jnp.float32):
    return f"it needs bfloat16 or float32, not {q_BxTxHxC.dtype}"
  kv_heads, width = k_BxTxKxC.shape[2:]
  if width not in (64, 128, 256):
    return f"it needs a head width of 64, 128 or 256, not {width}"
  if kv_heads * width % _LANES:
    return f"it needs key heads that fill {_LANES} lanes, not {kv_heads} of {width}"
  # What is computed between loads and stores takes up to a MiB more.
  needed = _Shape.of(q_BxTxHxC, k_BxTxKxC, max_segment).vmem_bytes(q_BxTxHxC.dtype.itemsize) + (1 << 20)
  if needed > _vmem_bytes():
    return f"segments of {max_segment} and these heads need {-(-needed >> 20)} MiB of VMEM, of {_vmem_bytes() >> 20}"
  return None


def segment_attention(
  q_BxTxHxC: jax.Array, k_BxTxKxC: jax.Array, v_BxTxKxC: jax.Array, start_BxT: jax.Array, *, max_segment: int
) -> jax.Array:
  """Computes the operation. Rows of any length are padded to whole blocks."""
  B, T = start_BxT.shape
  shape = _Shape.of(q_BxTxHxC, k_BxTxKxC, max_segment)
  block = shape.block
  q = without_lone_queries(q_BxTxHxC, start_BxT) * shape.power_of_scale
  q, k, v = (jnp.pad(x.reshape(B, T, -1), ((0, 0), (0, -T % block), (0, 0))) for x in (q, k_BxTxKxC, v_BxTxKxC))
  start = padded_starts(start_BxT, block)[:, None, None]
  start = jnp.broadcast_to(start, (B, k.shape[2] // shape.lanes, *start.shape[2:]))
  return _differentiable(shape, q, k, v, start)[:, :T].reshape(q_BxTxHxC.shape)


class _Shape(NamedTuple):
  """What a kernel is compiled for.

  Attributes:
    block: queries, or keys, in a block.
    walk: blocks that a walk has at most.
    width: of a head.
    group: query heads that share a key head.
  """

  block: int
  walk: int
  width: int
  group: int

  @classmethod
  def of(cls, q_BxTxHxC: jax.Array, k_BxTxKxC: jax.Array, max_segment: int) -> "_Shape":
    _, T, H, C = q_BxTxHxC.shape
    block = min(_BLOCK, -(-min(max_segment, T) // _LANES) * _LANES)
    walk = min(1 + -(-(max_segment - 1) // block), -(-T // block))
    return cls(block, walk, C, H // k_BxTxKxC.shape[2])

  @property
  def power_of_scale(self) -> float:
    """The part of 1/√C that is a power of two: queries take it without rounding."""
    return 2.0 ** -(self.width.bit_length() // 2)

  def scaled(self, x: jax.Array) -> jax.Array:
    """Returns scores, or their gradients, times what is left of 1/√C."""
    rest = self.width**-0.5 / self.power_of_scale
    return x if rest == 1 else x * rest

  def vmem_bytes(self, itemsize: int) -> int:
    """Returns what the gradient takes, the larger of the two kernels: blocks twice, for one is on its way."""
    waiting = self.walk * self.heads * self.width * 4
    by_channel = (2 * self.heads + 1) * self.lanes * itemsize + 2 * self.lanes * 4
    blocks = 2 * (3 * self.heads * self.width + 4 * self.lanes) * itemsize
    return (waiting + by_channel + blocks) * self.block

  @property
  def lanes(self) -> int:
    """Of the key heads that a step takes."""
    return max(_LANES, self.width)

  @property
  def heads(self) -> int:
    """Query heads that a step takes."""
    return self.lanes // self.width * self.group

  def key_head(self, head: int) -> slice:
    """The channels, out of `lanes`, of the key head that a query head sees."""
    begin = head // self.group * self.width
    return slice(begin, begin + self.width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(shape, q, k, v, start):
  return _attention(shape, q, k, v, start)[0]


def _forward(shape, q, k, v, start):
  y, lse = _attention(shape, q, k, v, start)
  return y, (q, k, v, start, y, lse)


def _backward(shape, residuals, dy):
  q, k, v, start, y, lse = residuals
  by_head = (*y.shape[:2], *lse.shape[1:3], shape.width)
  delta = (y.astype(jnp.float32) * dy.astype(jnp.float32)).reshape(by_head).sum(-1).transpose(0, 2, 3, 1)
  return *_attention_gradients(shape, q, k, v, start, dy, lse, delta), None


_differentiable.defvjp(_forward, _backward)


class _Reach(NamedTuple):
  """How far blocks see, [B, T / block] int32 each.

  Attributes:
    first: the first block of keys that a block of queries sees.
    end: one past the last block of queries that sees a block of keys.
    last_start: the first key that a block's last query sees; no other query's is later.
  """

  first: jax.Array
  end: jax.Array
  last_start: jax.Array


def _reach(shape: _Shape, start_BxT: jax.Array) -> _Reach:
  blocks = start_BxT.reshape(start_BxT.shape[0], -1, shape.block)
  first = blocks[:, :, 0] // shape.block
  # Starts never fall along a row, so the blocks of queries that see a block of keys stand together.
  end = (first[:, None, :] <= jnp.arange(first.shape[1])[:, None]).sum(-1, dtype=jnp.int32)
  return _Reach(first, end, blocks[:, :, -1])


def _if_seen(shape: _Shape, reach: _Reach, at, is_seen, start_ref, step) -> None:
  """Runs `step(confined)`, where `confined` gives hidden keys' scores [keys, queries] −∞, if there are hidden ones.

  Args:
    at: the row, its block of queries and its block of keys.
    is_seen: whether any of these queries sees any of these keys; nothing is run else.
    start_ref: the first key that each query sees, [1, queries].
  """
  row, query_block, key_block = at
  some_hidden = (key_block == query_block) | (key_block * shape.block < reach.last_start[row, query_block])

  @pl.when(is_seen & some_hidden)
  def _():
    square = (shape.block, shape.block)
    key = key_block * shape.block + lax.broadcasted_iota(jnp.int32, square, 0)
    query = query_block * shape.block + lax.broadcasted_iota(jnp.int32, square, 1)
    visible = (key <= query) & (key >= start_ref[...])
    step(lambda scores: jnp.where(visible, scores, -jnp.inf))

  pl.when(is_seen & ~some_hidden)(lambda: step(lambda scores: scores))


def _transposed(x):
  return x.astype(jnp.float32).T.astype(x.dtype)  # through whole registers: two numbers of 16 bits share one


def _by_channel(shape: _Shape, x_ref, out_ref) -> None:
  """Puts a block of queries [queries, heads · C] into [heads, lanes, queries], zero but for its key head's channels."""
  out_ref[...] = jnp.zeros_like(out_ref)
  for tile in range(0, x_ref.shape[1], shape.lanes):
    x = _transposed(x_ref[:, tile : tile + shape.lanes])
    for i in range(shape.lanes // shape.width):
      head = tile // shape.width + i
      out_ref[head, shape.key_head(head)] = x[i * shape.width : (i + 1) * shape.width]


def _by_query(shape: _Shape, by_head: list[jax.Array], out_ref) -> None:
  """Writes a block of queries [queries, heads · C], given as [C, queries] float32 for each head."""
  together = shape.lanes // shape.width
  for tile in range(len(by_head) // together):
    x = jnp.concatenate(by_head[tile * together : (tile + 1) * together], axis=0)
    out_ref[:, tile * shape.lanes : (tile + 1) * shape.lanes] = x.T.astype(out_ref.dtype)


def _product(a, b, contracted: tuple[int, int] = (1, 0)):
  return lax.dot_general(a, b, (((contracted[0],), (contracted[1],)), ((), ())), preferred_element_type=jnp.float32)


def _walk(shape: _Shape, kernel, inputs, outputs, scratch):
  """Calls `kernel(reach, refs)` for each row, group of heads, block, and step of the block's walk.

  Args:
    inputs, outputs: pairs of an array, or its shape, and a function from (reach, row, block, step) to the block of it
      that a step takes. Arrays are [B, T, heads · C] or [B, groups, heads of a group, T]. The first has the starts.
  """
  start = inputs[0][0]
  reach = _reach(shape, start[:, 0, 0])

  def spec(x, place):
    def at(row, group, block, step, *reach):
      here = place(_Reach(*reach), row, block, step)
      return (row, group, 0, here) if x.ndim == 4 else (row, here, group)

    one = (None, x.shape[2], shape.block) if x.ndim == 4 else (shape.block, x.shape[2] // start.shape[1])
    return pl.BlockSpec((None, *one), at)

  return pl.pallas_call(
    lambda *refs: kernel(_Reach(*refs[: len(reach)]), *refs[len(reach) :]),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(reach),
      grid=(*start.shape[:2], start.shape[3] // shape.block, shape.walk),
      in_specs=[spec(*pair) for pair in inputs],
      out_specs=[spec(*pair) for pair in outputs],
      scratch_shapes=[pltpu.VMEM(*array) for array in scratch],
    ),
    out_shape=[x for x, _ in outputs],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=_vmem_bytes()
    ),
  )(*reach, *(x for x, _ in inputs))


@functools.partial(jax.jit, static_argnums=0)
def _attention(shape: _Shape, q, k, v, start):
  """Returns y [B, T, H·C], and the log Σ exp of each query's scores [B, groups, heads of a group, T] in float32."""

  def kernel(reach, start_ref, q_ref, k_ref, v_ref, y_ref, lse_ref, q_by_channel, largest, total, y_sum):
    row, query_block, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    key_block, first = query_block - step, reach.first[row, query_block]

    @pl.when(step == 0)
    def _():
      _by_channel(shape, q_ref, q_by_channel)
      # A query sees itself in the first block, so that its maximum is finite from then on.
      largest[...] = jnp.full_like(largest, -jnp.inf)
      total[...] = jnp.zeros_like(total)
      y_sum[...] = jnp.zeros_like(y_sum)

    def attend(confined):
      v_by_channel = _transposed(v_ref[...])
      for head in range(shape.heads):
        at = slice(head, head + 1)
        scores = confined(shape.scaled(_product(k_ref[...], q_by_channel[head])))
        new_largest = jnp.maximum(largest[at], scores.max(axis=0, keepdims=True))
        p, shrink = jnp.exp(scores - new_largest), jnp.exp(largest[at] - new_largest)
        largest[at] = new_largest
        total[at] = total[at] * shrink + p.sum(axis=0, keepdims=True)
        y_sum[head] = y_sum[head] * shrink + _product(v_by_channel[shape.key_head(head)], p.astype(v.dtype))

    _if_seen(shape, reach, (row, query_block, key_block), key_block >= first, start_ref, attend)

    @pl.when(key_block == first)
    def _():
      _by_query(shape, [y_sum[head] / total[head : head + 1] for head in range(shape.heads)], y_ref)
      lse_ref[...] = largest[...] + jnp.log(total[...])

  def queries(reach, row, block, step):
    return block

  def keys(reach, row, block, step):
    return jnp.maximum(block - step, reach.first[row, block])

  lse = jax.ShapeDtypeStruct((*start.shape[:2], shape.heads, start.shape[3]), jnp.float32)
  rows = ((shape.heads, shape.block), jnp.float32)
  return _walk(
    shape,
    kernel,
    ((start, queries), (q, queries), (k, keys), (v, keys)),
    ((jax.ShapeDtypeStruct(q.shape, q.dtype), queries), (lse, queries)),
    (
      ((shape.heads, shape.lanes, shape.block), q.dtype),
      rows,
      rows,
      ((shape.heads, shape.width, shape.block), jnp.float32),
    ),
  )


@functools.partial(jax.jit, static_argnums=0)
def _attention_gradients(shape: _Shape, q, k, v, start, dy, lse, delta):
  """Returns dq, dk and dv.

  Args:
    delta: Σ y·dy of each query, as `lse` of `_attention`.
  """
  dtype = q.dtype

  def kernel(reach, *refs):
    start_ref, q_ref, dy_ref, lse_ref, delta_ref, k_ref, v_ref = refs[:7]
    dq_ref, dk_ref, dv_ref = refs[7:10]
    q_by_channel, dy_by_channel, k_by_channel, dk_sum, dv_sum, waiting = refs[10:]
    row, key_block, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    end = reach.end[row, key_block]
    is_seen, query_block = key_block + step < end, jnp.minimum(key_block + step, end - 1)
    slot = lax.rem(query_block, shape.walk)

    @pl.when(step == 0)
    def _():
      k_by_channel[...] = _transposed(k_ref[...])
      dk_sum[...] = jnp.zeros_like(dk_sum)
      dv_sum[...] = jnp.zeros_like(dv_sum)

    @pl.when(is_seen & (key_block == reach.first[row, query_block]))
    def _():
      waiting[slot] = jnp.zeros(waiting.shape[1:], jnp.float32)

    def add_gradients(confined):
      _by_channel(shape, q_ref, q_by_channel)
      _by_channel(shape, dy_ref, dy_by_channel)
      for head in range(shape.heads):
        at = slice(head, head + 1)
        scores = confined(shape.scaled(_product(k_ref[...], q_by_channel[head])))
        p = jnp.exp(scores - lse_ref[at])
        ds = shape.scaled(p * (_product(v_ref[...], dy_by_channel[head]) - delta_ref[at]))
        p, ds = p.astype(dtype), ds.astype(dtype)
        # The other key heads' channels of q and dy are zero.
        dk_sum[...] += _product(ds, q_by_channel[head], (1, 1))
        dv_sum[...] += _product(p, dy_by_channel[head], (1, 1))
        waiting[slot, head] += _product(k_by_channel[shape.key_head(head)], ds)

    _if_seen(shape, reach, (row, query_block, key_block), is_seen, start_ref, add_gradients)

    @pl.when(step == 0)
    def _():
      _by_query(shape, [waiting[slot, head] for head in range(shape.heads)], dq_ref)

    @pl.when(step == shape.walk - 1)
    def _():
      dk_ref[...] = dk_sum[...].astype(dtype)
      dv_ref[...] = dv_sum[...].astype(dtype)

  def queries(reach, row, block, step):
    return jnp.minimum(block + step, reach.end[row, block] - 1)

  def keys(reach, row, block, step):
    return block

  by_channel = ((shape.heads, shape.lanes, shape.block), dtype)
  sums = ((shape.block, shape.lanes), jnp.float32)
  return _walk(
    shape,
    kernel,
    [*((x, queries) for x in (start, q, dy, lse, delta)), (k, keys), (v, keys)],
    [(jax.ShapeDtypeStruct(x.shape, dtype), keys) for x in (q, k, v)],
    (
      by_channel,
      by_channel,
      ((shape.lanes, shape.block), dtype),
      sums,
      sums,
      ((shape.walk, shape.heads, shape.width, shape.block), jnp.float32),
    ),
  )

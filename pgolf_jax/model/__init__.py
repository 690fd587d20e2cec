"""The model: parameters, one forward pass, its loss, its adapters.

Letters of array names (`x_BxTxD` has the axes B, T and D):

  B  rows                       L  physical layers
  T  positions of a row         P  positions of the layer list, in which looped layers stand several times
  D  width of the model         R  rank of an adapter
  H  query heads                V  vocabulary
  K  key and value heads        F  width of the MLP's hidden layer
  C  width of a head
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Int

from pgolf_jax.kernels.segment_attention import segment_attention, segment_starts


class Context(NamedTuple):
  """How rows are run: what their tokens attend to, where they stand in their text, and the form of the model.

  Attributes:
    attend: (position in the layer list, q [B, T, H, C], k, v [B, T, K, C], all rotated and normed)
      → (y [B, T, H, C], cache). The cache is any tree; `Output.cache` hands it back.
    looping: whether the looped layers run `num_loops` more times.
    dtype: of the computation; parameters are cast where they are used.
    first_position: rotary position of each row's first token.
    before_B: the token before each row, which the smear gate reads; None where rows begin a text.
    tap: called with the name and the value of every activation, in forward order, while the pass is traced:
      `embedding`; for position p of the layer list, which runs layer i, `p.blocks.i.q`, `.k`, `.v` (as attention reads
      them), `.attend` (what it returns), `.attn` and `.mlp` (after the output matrices), and what the layer makes of
      the residual lane, `.x`, or of the two, `.lane0` and `.lane1`; last `hidden`. p has two digits.
  """

  attend: Callable[[int, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
  looping: bool
  dtype: Any
  first_position: Int[Array, ""] | int = 0
  before_B: Int[Array, "B"] | None = None
  tap: Callable[[str, jax.Array], None] | None = None


def segments(start_BxT: Int[Array, "B T"], *, max_segment: int, looping: bool, dtype) -> Context:
  """Returns the context of rows whose tokens attend to their own segment, as far as themselves.

  Args:
    start_BxT: first position that each token may attend to; see `kernels.segment_attention`.
    max_segment: static bound on a segment's length, in tokens.
    looping, dtype: see `Context`.
  """

  def attend(position, q, k, v):
    del position
    return segment_attention(q, k, v, start_BxT=start_BxT, max_segment=max_segment), None

  return Context(attend, looping, dtype)


def packed(tokens_BxT: Int[Array, "B T"], *, bos_id: int, seq_len: int, looping: bool, dtype) -> Context:
  """Returns the context of rows of documents end to end.

  Segments begin at 0, at every `bos_id`, and each `seq_len` tokens after a document's start.
  """
  start_BxT = segment_starts(tokens_BxT, bos_id=bos_id, seq_len=seq_len)
  return segments(start_BxT, max_segment=seq_len, looping=looping, dtype=dtype)

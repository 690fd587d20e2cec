"""One chunk of every document: scored by a forward pass, learnt from by the gradient of the same pass.

Letters: B rows of a device that take part, W tokens of a window, X targets of a chunk (its width), S positions of a
scan; the rest as in model/block.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pgolf_jax.kernels.softcapped_xent import api as xent
from pgolf_jax.kernels.softcapped_xent.reference import softcap
from pgolf_jax.model.adapters import Adaptation, Adapters
from pgolf_jax.model.context import segments
from pgolf_jax.model.gpt import bind
from pgolf_jax.model.params import Params
from pgolf_jax.scoring.tilt import tilt
from pgolf_jax.settings.config import ModelConfig


class Rows(NamedTuple):
  """The documents of a batch, one a row; a row without a document has no targets."""

  start: jax.Array  # [B] position of the bos in the stream
  targets: jax.Array  # [B]
  learns: jax.Array  # [B] bool


class Scored(NamedTuple):
  """What a chunk's forward pass says of its targets."""

  model_nll: jax.Array  # [B, X] of the target, before the tilt; 0 beyond the chunk's end
  nll: jax.Array  # [B, X] after the tilt
  logp: jax.Array | None  # [B, X, V] of every token after the tilt, where asked for


class Chunk(NamedTuple):
  """Where the chunk stands: row by row, as documents end differently."""

  window_start: jax.Array  # [B] in tokens after the document's bos
  window_length: jax.Array  # [B]
  position: jax.Array  # [B, X] of each target's input within the window
  target: jax.Array  # [B, X]
  valid: jax.Array  # [B, X]


def locate(stream_N: jax.Array, rows: Rows, k: jax.Array, size: jax.Array, *, seq_len: int, width: int) -> Chunk:
  """Chunk k of each row: its window ends at the chunk's end and has at most `seq_len` tokens."""
  first = k * size
  end_B = jnp.minimum(first + size, rows.targets)
  window_start_B = jnp.maximum(end_B - seq_len, 0)
  within_X = jnp.arange(width)
  valid = (within_X < size) & (first + within_X < rows.targets[:, None])
  target = jnp.where(valid, stream_N[rows.start[:, None] + first + within_X + 1], 0)
  return Chunk(
    window_start=window_start_B,
    window_length=jnp.where(end_B > first, end_B - window_start_B, 0),
    position=first + within_X - window_start_B[:, None],
    target=target,
    valid=valid,
  )


def window_tokens(stream_N: jax.Array, rows: Rows, chunk: Chunk, window: int) -> Int[Array, "B W"]:
  """Tokens of each row's window; 0 after its end."""
  within_W = jnp.arange(window)
  at = (rows.start + chunk.window_start)[:, None] + within_W
  return jnp.where(within_W < chunk.window_length[:, None], stream_N[at], 0)


def score(
  config: ModelConfig,
  params: Params,
  hidden_BxTxD: jax.Array,
  adapters: Adapters,
  scale: float,
  chunk: Chunk,
  hint_BxX: jax.Array,
  boost: float,
  *,
  distributions: bool,
) -> Scored:
  """The chunk's targets under the evaluation softcaps, from the hidden states of the tokens before them.

  Args:
    hint_BxX: the token that the distribution is tilted towards; −1 where the gate is shut.
    boost: β of the tilt, nats.
  """
  B, T = hidden_BxTxD.shape[:2]
  at = jnp.clip(chunk.position, 0, T - 1)
  model = bind(config, params)
  z = model.logits(jnp.take_along_axis(hidden_BxTxD, at[..., None], axis=1), Adaptation(adapters, scale))
  cap_pos, cap_neg = model.caps(evaluation=True)
  V = z.shape[-1]
  gate, hint = hint_BxX >= 0, jnp.maximum(hint_BxX, 0)
  flat = (z.reshape(-1, V), chunk.target.reshape(-1), hint.reshape(-1))
  nll, hint_logp = (x.reshape(B, -1) for x in xent.softcapped_xent_with_hint(*flat, cap_pos=cap_pos, cap_neg=cap_neg))
  beta = jnp.full_like(nll, boost)
  tilted = tilt(nll, hint_logp, chunk.target, hint, gate, beta)
  logp = None
  if distributions:
    before = jax.nn.log_softmax(softcap(z.astype(jnp.float32), cap_pos, cap_neg), axis=-1)
    every = jnp.broadcast_to(jnp.arange(V), before.shape)
    logp = -tilt(-before, hint_logp[..., None], every, hint[..., None], gate[..., None], beta[..., None])
  return Scored(jnp.where(chunk.valid, nll, 0), tilted, logp)


def forward(
  config: ModelConfig, params: Params, tokens_BxW: jax.Array, adapters: Adapters, scale: float, dtype
) -> jax.Array:
  """Hidden states of windows computed afresh, [B, W, D]."""
  context = segments(jnp.zeros_like(tokens_BxW), max_segment=tokens_BxW.shape[1], looping=True, dtype=dtype)
  return bind(config, params)(tokens_BxW, context, Adaptation(adapters, scale)).hidden


def learning_loss(scored: Scored, rows: Rows, k: jax.Array, size: jax.Array) -> jax.Array:
  """Sum over learning documents of the mean loss of their chunk; a document's last chunk teaches nothing."""
  continues_B = rows.learns & (rows.targets > (k + 1) * size)
  return jnp.sum(jnp.where(continues_B, scored.model_nll.sum(axis=1) / size, 0))

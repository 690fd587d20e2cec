"""Softcapped cross-entropy: from logits, from logits with a hint, and fused with the head's product.

The fused form takes the tokens in blocks, so that the logits of all tokens never exist at once where they are many for
the hardware's memory.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pgolf_jax.kernels import hardware
from pgolf_jax.kernels.numerics import product
from pgolf_jax.kernels.operation import Operation
from pgolf_jax.kernels.softcapped_xent.vjp import zero_gradient

_BLOCK_LOGITS = 2**25
"""Logits in a block: 4096 tokens of 8192."""
_GPU_BLOCK_LOGITS = 2**28
"""Logits in a block on GPUs: 32,768 tokens of 8192. 4096 would leave half of a large card's multiprocessors without
work."""
_HOPPER_BLOCK_LOGITS = 2**30
"""Logits in a block on Hopper GPUs, whose memory is 80 GB or more: 131,072 tokens of 8192, 2 GiB in 16 bits, and as
much for their gradient."""


def block_count(tokens: int, vocabulary: int) -> int:
  """Returns the number of blocks into which the hardware of the current trace divides so many tokens."""
  target, logits = hardware.target(), _BLOCK_LOGITS
  if target.is_gpu:
    logits = _HOPPER_BLOCK_LOGITS if target.is_hopper else _GPU_BLOCK_LOGITS
  return -(-tokens // max(1, logits // vocabulary))


def block_size(tokens: int, vocabulary: int) -> int:
  """Returns the number of tokens in each of these blocks, padding included."""
  return -(-tokens // block_count(tokens, vocabulary))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def in_blocks(
  block_loss: Callable[..., jax.Array],
  blocks: int,
  x_NxD: jax.Array,
  weight_VxD: jax.Array,
  target_N: jax.Array,
  cap_pos: jax.Array,
  cap_neg: jax.Array,
) -> jax.Array:
  """Computes `block_loss(x, weight, target, cap_pos, cap_neg)`, one loss a token, over `blocks` blocks of tokens.

  The gradient goes through `block_loss` again block by block and sums the weight's in float32. The last
  block is padded with zero tokens whose losses are dropped.
  """
  return _forward(block_loss, blocks, x_NxD, weight_VxD, target_N, cap_pos, cap_neg)[0]


def _split(blocks: int, a_N: jax.Array) -> jax.Array:
  size = -(-a_N.shape[0] // blocks)
  padding = [(0, blocks * size - a_N.shape[0])] + [(0, 0)] * (a_N.ndim - 1)
  return jnp.pad(a_N, padding).reshape(blocks, size, *a_N.shape[1:])


def _join(a_BxN: jax.Array, n: int) -> jax.Array:
  return a_BxN.reshape(-1, *a_BxN.shape[2:])[:n]


def _forward(block_loss, blocks, x_NxD, weight_VxD, target_N, cap_pos, cap_neg):
  loss = jax.lax.map(
    lambda block: block_loss(block[0], weight_VxD, block[1], cap_pos, cap_neg),
    (_split(blocks, x_NxD), _split(blocks, target_N)),
  )
  return _join(loss, x_NxD.shape[0]), (x_NxD, weight_VxD, target_N, cap_pos, cap_neg)


def _backward(block_loss, blocks, residuals, d_loss_N):
  x_NxD, weight_VxD, target_N, cap_pos, cap_neg = residuals

  def step(d_weight_VxD, block):
    x, target, d_loss = block
    _, pull = jax.vjp(lambda x, weight: block_loss(x, weight, target, cap_pos, cap_neg), x, weight_VxD)
    dx, d_weight = pull(d_loss)
    return d_weight_VxD + d_weight.astype(jnp.float32), dx

  start = jnp.zeros(weight_VxD.shape, jnp.float32)
  inputs = tuple(_split(blocks, a_N) for a_N in (x_NxD, target_N, d_loss_N))
  d_weight_VxD, dx = jax.lax.scan(step, start, inputs)
  no_gradients = zero_gradient(target_N), jnp.zeros_like(cap_pos), jnp.zeros_like(cap_neg)
  return _join(dx, x_NxD.shape[0]), d_weight_VxD.astype(weight_VxD.dtype), *no_gradients


in_blocks.defvjp(_forward, _backward)


Cap = Float[Array, ""] | float


def _check(z_NxV, target_N, hint_N, *, cap_pos: Cap, cap_neg: Cap) -> None:
  if z_NxV.ndim != 2 or not jnp.issubdtype(z_NxV.dtype, jnp.floating):
    raise ValueError(f"z must be [N, V] of a floating type, not {z_NxV.shape} of {z_NxV.dtype}")
  for index_N in (target_N,) if hint_N is None else (target_N, hint_N):
    if index_N.shape != z_NxV.shape[:1] or not jnp.issubdtype(index_N.dtype, jnp.integer):
      raise ValueError(f"one integer a row is needed: {index_N.shape} of {index_N.dtype} for {z_NxV.shape=}")


OPERATION = Operation("softcapped_xent", _check)


def softcapped_xent(
  z_NxV: Float[Array, "N V"],
  target_N: Int[Array, "N"],
  *,
  cap_pos: Cap,
  cap_neg: Cap,
  implementation: str | None = None,
) -> Float[Array, "N"]:
  """Returns the negative log-probability, in nats, of each target under softmax(c·tanh(z/c)).

  c is cap_pos where z > 0 and cap_neg elsewhere. All arithmetic is float32. The gradient reaches z alone: a
  row's logits are read once forward and once backward.

  Args:
    z_NxV: logits before the softcap.
    target_N: column of each row's target, in 0..V-1.
    cap_pos, cap_neg: positive scalars, static or traced.
    implementation: a backend to insist on, or None to take the first that is possible.

  Returns:
    nll_N, float32.

  Raises:
    ValueError: shapes or types do not fit together, or the implementation is unknown or not possible.
  """
  caps = _scalars(cap_pos, cap_neg)
  return OPERATION(z_NxV, target_N, None, **caps, implementation=implementation)[0]


def softcapped_xent_with_hint(
  z_NxV: Float[Array, "N V"],
  target_N: Int[Array, "N"],
  hint_N: Int[Array, "N"],
  *,
  cap_pos: Cap,
  cap_neg: Cap,
  implementation: str | None = None,
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
  """Returns `softcapped_xent`, and the log-probability of a second column of each row, from the same pass.

  Args:
    hint_N: the second column, in 0..V-1.

  Returns:
    nll_N of the target and hint_logp_N, both float32 and both differentiable.
  """
  return OPERATION(z_NxV, target_N, hint_N, **_scalars(cap_pos, cap_neg), implementation=implementation)


def linear_softcapped_xent(
  x_NxD: Float[Array, "N D"],
  weight_VxD: Float[Array, "V D"],
  target_N: Int[Array, "N"],
  *,
  cap_pos: Cap,
  cap_neg: Cap,
  implementation: str | None = None,
) -> Float[Array, "N"]:
  """Returns `softcapped_xent` of the logits x · weightᵀ, which never exist for more than a block of tokens at a time.

  The gradient computes the logits of each block again, unless there is one block, whose logits are held. They are
  rounded to the type of x, as if they had been made by a product of their own.

  Args:
    x_NxD: N tokens, of the type of weight.
    weight_VxD: the head.

  Raises:
    ValueError: as `softcapped_xent`.
  """
  if x_NxD.ndim != 2 or weight_VxD.ndim != 2 or x_NxD.shape[1] != weight_VxD.shape[1]:
    raise ValueError(f"x [N, D] and weight [V, D] do not fit: {x_NxD.shape=}, {weight_VxD.shape=}")
  if x_NxD.dtype != weight_VxD.dtype:
    raise ValueError(f"x and weight must have one type, not {x_NxD.dtype} and {weight_VxD.dtype}")
  if target_N.shape != x_NxD.shape[:1]:
    raise ValueError(f"one target a row is needed: {target_N.shape=} for {x_NxD.shape=}")

  def block_nll(x_BxD, weight_VxD, target_B, cap_pos, cap_neg):
    caps = {"cap_pos": cap_pos, "cap_neg": cap_neg}
    return OPERATION(_logits(x_BxD, weight_VxD), target_B, None, **caps, implementation=implementation)[0]

  blocks = block_count(x_NxD.shape[0], weight_VxD.shape[0])
  arguments = x_NxD, weight_VxD, target_N, *_scalars(cap_pos, cap_neg).values()
  return block_nll(*arguments) if blocks == 1 else in_blocks(block_nll, blocks, *arguments)


def _scalars(cap_pos: Cap, cap_neg: Cap) -> dict[str, jax.Array]:
  return {"cap_pos": jnp.asarray(cap_pos, jnp.float32), "cap_neg": jnp.asarray(cap_neg, jnp.float32)}


@jax.custom_vjp
def _logits(x_NxD, weight_VxD):
  """The head's product. JAX's own gradient of it would multiply in float32, at half of a GPU's rate or less."""
  return product("nd,vd->nv", x_NxD, weight_VxD)


def _logits_gradient(residuals, dz_NxV):
  x_NxD, weight_VxD = residuals
  return product("nv,vd->nd", dz_NxV, weight_VxD), product("nv,nd->vd", dz_NxV, x_NxD)


_logits.defvjp(lambda x, weight: (_logits(x, weight), (x, weight)), _logits_gradient)

"""Text from a model, token by token. T positions of a bucket, V vocabulary."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pgolf_jax.data import caseops
from pgolf_jax.data.shards import BOS
from pgolf_jax.data.tokenizer import Tokenizer
from pgolf_jax.errors import UserError
from pgolf_jax.model.context import segments
from pgolf_jax.model.gpt import bind
from pgolf_jax.model.params import Params
from pgolf_jax.settings.config import ModelConfig

_SMALLEST_BUCKET = 64
_EOS = 2
_UNFINISHED = "\ufffd"  # what a decoder makes of the first bytes of a character


def next_logits(config: ModelConfig, dtype=jnp.bfloat16):
  """A compiled function (params, tokens_T, count) → evaluation logits [V] after the first `count` tokens.

  Lengths are padded to powers of two, so that few programs are compiled. What stands after `count` does not matter.
  """

  @functools.partial(jax.jit, static_argnames=("length",))
  def logits(params: Params, tokens_1xT: jax.Array, count: jax.Array, *, length: int) -> jax.Array:
    model = bind(config, params)
    context = segments(jnp.zeros_like(tokens_1xT), max_segment=length, looping=True, dtype=dtype)
    hidden_1xTxD = model(tokens_1xT, context).hidden
    return model.evaluation_logits(jax.lax.dynamic_slice_in_dim(hidden_1xTxD, count - 1, 1, axis=1))[0, 0]

  def padded(params: Params, tokens_T: np.ndarray) -> np.ndarray:
    length = max(_SMALLEST_BUCKET, 1 << (len(tokens_T) - 1).bit_length())
    row_1xT = np.zeros((1, length), np.int32)
    row_1xT[0, : len(tokens_T)] = tokens_T
    return np.asarray(logits(params, row_1xT, np.int32(len(tokens_T)), length=length))

  return padded


def sample(logits_V: np.ndarray, rng: np.random.Generator, *, temperature: float, top_p: float) -> int:
  """One token: the likeliest at temperature 0, else drawn from the fewest that together have probability `top_p`."""
  if temperature == 0:
    return int(np.argmax(logits_V))
  scaled_V = (logits_V.astype(np.float64) - logits_V.max()) / temperature
  share_V = np.exp(scaled_V)
  share_V /= share_V.sum()
  order_V = np.argsort(-share_V, kind="stable")
  before_V = np.cumsum(share_V[order_V]) - share_V[order_V]
  kept = order_V[before_V < top_p]
  return int(rng.choice(kept, p=share_V[kept] / share_V[kept].sum()))


def generate(
  config: ModelConfig,
  params: Params,
  tokenizer: Tokenizer,
  prompt: str,
  *,
  tokens: int,
  context: int,
  temperature: float,
  top_p: float,
  seed: int,
  rewritten: bool,
  dtype=jnp.bfloat16,
) -> Iterator[str]:
  """The continuation of `prompt` in pieces of text, as they become certain.

  Args:
    tokens: most tokens to make; a bos or eos of the model's ends it sooner.
    context: tokens at the end that the model sees.
    temperature, top_p: see `sample`.
    seed: the same seed gives the same text.
    rewritten: whether the model knows text as CaseOps writes it; then that is undone.

  Raises:
    UserError: a number out of its range, or the tokenizer is not the model's.
  """
  if temperature < 0 or not 0 < top_p <= 1 or tokens < 0:
    raise UserError(
      f"temperature={temperature} must be 0 or more, top_p={top_p} in (0, 1], tokens={tokens} 0 or more; mend that."
    )
  if tokenizer.vocab_size != config.vocab_size:
    raise UserError(
      f"The tokenizer has {tokenizer.vocab_size} pieces, the model {config.vocab_size}; give its own with --tokenizer."
    )
  step, rng = next_logits(config, dtype), np.random.default_rng(seed)
  known = [BOS, *tokenizer.encode(caseops.encode(prompt) if rewritten else prompt).tolist()]
  first = len(known)

  def text() -> str:
    coded = tokenizer.decode(known)
    return caseops.decode(coded, strict=False) if rewritten else coded

  shown = len(text())
  for _ in range(tokens):
    token = sample(step(params, np.array(known[-context:], np.int32)), rng, temperature=temperature, top_p=top_p)
    if token in (BOS, _EOS):
      break
    known.append(token)
    so_far = text()
    # A marker at the end waits for its letter and a byte for the rest of its character.
    if len(so_far) > shown and not so_far.endswith(_UNFINISHED):
      yield so_far[shown:]
      shown = len(so_far)
  if len(known) > first and len(text()) > shown:
    yield text()[shown:]

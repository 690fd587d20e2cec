"""Text from a model, token by token. Letters: see model/__init__.py."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pgolf_jax.data import caseops
from pgolf_jax.data.shards import BOS
from pgolf_jax.data.tokenizer import Tokenizer
from pgolf_jax.errors import UserError
from pgolf_jax.model import segments
from pgolf_jax.model.gpt import bind
from pgolf_jax.model.params import Params
from pgolf_jax.settings import ModelConfig, Settings
from pgolf_jax.settings.fields import INDEX, NOT_NEGATIVE, PROPER_SHARE, Range

_SMALLEST_BUCKET = 64  # tokens
_EOS = 2
_UNFINISHED = "\ufffd"  # a decoder returns it for the first bytes of a character


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a continuation is drawn."""

  tokens: int = 200  # at most; a bos or eos of the model ends the text sooner
  temperature: float = 0.8  # 0 takes the likeliest token each time, 1 samples from the model's distribution
  top_p: float = 0.95  # sample from the fewest tokens that together have this probability
  seed: int = 0  # the same seed gives the same text

  def __post_init__(self):
    ranges = {"tokens": INDEX, "temperature": NOT_NEGATIVE, "top_p": PROPER_SHARE, "seed": Range(0, math.inf)}
    for name, within in ranges.items():
      number = getattr(self, name)
      if not within.holds(number):
        raise UserError(f"{name}={number} must be {within}.")


def generate(
  settings: Settings, params: Params, tokenizer: Tokenizer, prompt: str, sampling: Sampling
) -> Iterator[str]:
  """Yields the continuation of `prompt` in pieces of text, each as soon as later tokens cannot change it.

  Args:
    settings: of the model; it sees the last `eval.seq_len` tokens. The prompt is rewritten for the model as its
      training text was (`data.caseops`, `data.caseops_markers`), and its output is turned back into ordinary text.
    tokenizer: the one that the model was trained with.
    sampling: length, temperature and seed.

  Raises:
    UserError: the tokenizer's vocabulary is not of the model's size.
  """
  vocab_size, context, markers = settings.model.vocab_size, settings.eval.seq_len, settings.data.markers
  if tokenizer.vocab_size != vocab_size:
    raise UserError(
      f"The tokenizer has {tokenizer.vocab_size} pieces, the model {vocab_size}; give its own with --tokenizer."
    )
  logits = next_logits(settings.model, jnp.dtype(settings.train.compute_dtype))
  rng = np.random.default_rng(sampling.seed)
  tokens = [BOS, *tokenizer.encode(caseops.encode(prompt, markers)).tolist()]
  prompt_tokens = len(tokens)

  def text() -> str:
    return caseops.decode(tokenizer.decode(tokens), markers, strict=False)

  shown = len(text())
  for _ in range(sampling.tokens):
    logits_V = logits(params, np.array(tokens[-context:], np.int32))
    token = sample(logits_V, rng, temperature=sampling.temperature, top_p=sampling.top_p)
    if token in (BOS, _EOS):
      break
    tokens.append(token)
    so_far = text()
    # A marker at the end waits for its letter, and a byte for the rest of its character.
    if len(so_far) > shown and not so_far.endswith(_UNFINISHED):
      yield so_far[shown:]
      shown = len(so_far)
  if len(tokens) > prompt_tokens and len(text()) > shown:
    yield text()[shown:]


@functools.cache
def next_logits(config: ModelConfig, dtype=jnp.bfloat16) -> Callable[[Params, np.ndarray], np.ndarray]:
  """Returns a function (params, tokens_T) → evaluation logits [V] of the token that comes next.

  Rows are padded to powers of two, so that few programs are compiled.
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
  """Returns one token: the likeliest at temperature 0, else drawn from the fewest with probability `top_p` in sum."""
  if temperature == 0:
    return int(np.argmax(logits_V))
  scaled_V = (logits_V.astype(np.float64) - logits_V.max()) / temperature
  share_V = np.exp(scaled_V)
  share_V /= share_V.sum()
  order_V = np.argsort(-share_V, kind="stable")
  before_V = np.cumsum(share_V[order_V]) - share_V[order_V]
  nucleus = order_V[before_V < top_p]
  return int(rng.choice(nucleus, p=share_V[nucleus] / share_V[nucleus].sum()))

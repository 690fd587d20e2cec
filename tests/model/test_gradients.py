"""Gradients in bfloat16 against float32, where a sum over tokens would show that it was added up in bfloat16.

bfloat16 rounds a number by up to 2⁻⁹. Through the few dozen operations of the model such errors, of either sign, leave
gradients that are 0.1 % to 1.5 % off; `BOUND` is twice that. A sum over thousands of tokens that is itself kept in
bfloat16 stops growing and is several times further off: each planted fault shows it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgolf_jax.kernels import softcapped_xent as xent
from pgolf_jax.kernels.residual_norm import xla as norm_xla
from pgolf_jax.kernels.rotary_heads import xla as rotary_xla
from pgolf_jax.model import adapters as model_adapters
from pgolf_jax.model import block, gpt, packed
from pgolf_jax.model import params as parameters
from pgolf_jax.model.adapters import Adaptation, Adapter
from pgolf_jax.model.gpt import bind, packed_nll
from pgolf_jax.settings import ModelConfig, Settings

BOUND = 0.03
"""Of a gradient's error, relative to the gradient's norm."""
TOKENS = 16_384
MODEL = ModelConfig(
  vocab_size=64, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, mlp_mult=2.0, num_loops=1, loop_start=0,
  loop_end=0, parallel_start_layer=1, rope_dims=4, tied_embed_init_std=0.3,
)  # fmt: skip
FORM = {"seq_len": 32, "looping": True}


def quickly(f):
  """`jax.jit` without the compiler's last optimisations, which take longer than they save here."""
  return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


def noisy(tree, key, size):
  leaves, structure = jax.tree.flatten(tree)
  keys = jax.random.split(jax.random.key(key), len(leaves))
  return structure.unflatten([x + size * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


@pytest.fixture(scope="module")
def params():
  return noisy(parameters.init(MODEL, jax.random.key(0)), 1, 0.1)


@pytest.fixture(scope="module")
def adapters():
  every_kind = model_adapters.init(MODEL, Settings().ttt, batch=1, rank=4, key=jax.random.key(2))
  D, V = MODEL.model_dim, MODEL.vocab_size
  q = Adapter(every_kind["o"].A, jnp.zeros((*every_kind["o"].A.shape[:-1], D)))
  v = Adapter(every_kind["k"].A, jnp.zeros_like(every_kind["k"].B))
  assert every_kind["head"].B.shape == (1, 4, V)
  return noisy({**every_kind, "q": q, "v": v}, 3, 0.1)


@pytest.fixture(scope="module")
def row():
  """One row of documents whose tokens, as in text, follow Zipf's law."""
  random = np.random.default_rng(0)
  share = 1 / np.arange(1, MODEL.vocab_size - 1)
  tokens = 2 + random.choice(len(share), size=(1, TOKENS + 1), p=share / share.sum())
  tokens[0, ::64] = MODEL.bos_id
  return jnp.asarray(tokens, jnp.int32)


@pytest.fixture(scope="module")
def of_weights(params, row):
  """dtype → gradient of the training loss in every parameter that the training loss reads."""

  def gradient(dtype):
    loss = lambda p: packed_nll(bind(MODEL, p), row, dtype=dtype, **FORM).mean()  # noqa: E731
    grads = quickly(jax.grad(loss))(params)
    return {name: np.asarray(g) for name, g in grads.items() if name not in parameters.SOFTCAPS}

  return gradient


@pytest.fixture(scope="module")
def of_adapters(params, adapters, row):
  """dtype → gradient of the evaluation loss in every adapter."""

  def gradient(dtype):
    def loss(adapters):
      model, adaptation = bind(MODEL, params), Adaptation(adapters, 0.5)
      context = packed(row[:, :-1], bos_id=MODEL.bos_id, dtype=dtype, **FORM)
      z = model.logits(model(row[:, :-1], context, adaptation).hidden, adaptation)[0]
      cap_pos, cap_neg = model.caps(evaluation=True)
      return xent.softcapped_xent(z, row[0, 1:], cap_pos=cap_pos, cap_neg=cap_neg).mean()

    grads = quickly(jax.grad(loss))(adapters)
    return {f"{kind}.{name}": np.asarray(g) for kind, a in grads.items() for name, g in a._asdict().items()}

  return gradient


@pytest.fixture(scope="module")
def exact_weights(of_weights):
  return of_weights(jnp.float32)


@pytest.fixture(scope="module")
def exact_adapters(of_adapters):
  return of_adapters(jnp.float32)


def errors(grads, exact) -> dict[str, float]:
  return {name: float(np.linalg.norm(grads[name] - g) / np.linalg.norm(g)) for name, g in exact.items()}


def test_every_parameter(of_weights, exact_weights):
  error = errors(of_weights(jnp.bfloat16), exact_weights)
  assert error.keys() == parameters.shapes(MODEL).keys() - set(parameters.SOFTCAPS)
  assert max(error.values()) < BOUND, error


def test_every_adapter(of_adapters, exact_adapters):
  error = errors(of_adapters(jnp.bfloat16), exact_adapters)
  assert len(error) == 2 * len(("q", "k", "v", "o", "mlp", "head"))
  assert max(error.values()) < BOUND, error


def sum_in_own_type(x_NxD: jax.Array) -> jax.Array:
  """Adds up rows one by one in their own type."""
  return jax.lax.scan(lambda total, x: (total + x, None), jnp.zeros_like(x_NxD[0]), x_NxD)[0]


def test_sums_kept_in_bfloat16_are_caught(monkeypatch, of_weights, exact_weights):
  """Plants both faults at once: neither changes the gradient that the other adds up."""

  @jax.custom_vjp
  def spread(factor, like):
    return jnp.broadcast_to(factor, like.shape).astype(like.dtype)

  def backward(saved, g):
    factor, like = saved
    total = sum_in_own_type(g.reshape(-1, *g.shape[2:]))
    if factor.ndim == 0 or factor.shape[-1] == 1:  # one factor for a whole lane, a head or a gate
      total = total.reshape(max(factor.size, 1), -1).sum(axis=1)
    return total.reshape(factor.shape).astype(factor.dtype), jnp.zeros_like(like)

  spread.defvjp(lambda factor, like: (spread(factor, like), (factor, like)), backward)
  for module in (block, gpt, norm_xla, rotary_xla):
    monkeypatch.setattr(module, "scaled", lambda x, factor: spread(factor, x) * x)
  monkeypatch.setattr(gpt, "embed", lambda table, tokens, dtype: table.astype(dtype)[tokens])
  error = errors(of_weights(jnp.bfloat16), exact_weights)
  shared = [
    name for name in error if name.endswith(("attn_scale", "resid_mix", "q_gain", "skip_weights", "lambdas", "gates"))
  ]
  assert len(shared) == 3 * MODEL.num_layers + 4
  for name in ("tok_emb.weight", *shared):
    assert error[name] > 4 * BOUND, (name, error[name])


def test_an_adapter_whose_gradient_is_added_up_in_bfloat16_is_caught(monkeypatch, of_adapters, exact_adapters):
  @jax.custom_vjp
  def product(x_BxTxI, weight_BxOxI):
    return jnp.einsum("bti,boi->bto", x_BxTxI, weight_BxOxI)

  def backward(saved, g):
    x, weight = saved
    terms_TxOxI = g[0, :, :, None] * x[0, :, None, :]
    return jnp.einsum("bto,boi->bti", g, weight), sum_in_own_type(terms_TxOxI)[None]

  product.defvjp(lambda x, weight: (product(x, weight), (x, weight)), backward)

  def delta(adapter, x, scale):
    return product(product(x, adapter.A.astype(x.dtype)), adapter.B.astype(x.dtype).swapaxes(1, 2)) * scale

  monkeypatch.setattr(block, "deltas", lambda adapters, *rest: {k: delta(a, *rest) for k, a in adapters.items()})
  monkeypatch.setattr(gpt, "delta", delta)
  error = errors(of_adapters(jnp.bfloat16), exact_adapters)
  assert min(error.values()) > 4 * BOUND, error

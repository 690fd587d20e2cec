import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgolf_jax.errors import UserError
from pgolf_jax.kernels.segment_attention import segment_starts
from pgolf_jax.model import packed
from pgolf_jax.model import params as parameters
from pgolf_jax.model.gpt import bind, packed_nll, parameter_names
from pgolf_jax.model.params import layer_order
from pgolf_jax.settings import ModelConfig

RECORD = ModelConfig()
SMALL = ModelConfig(
  vocab_size=64, num_layers=3, model_dim=32, num_heads=2, num_kv_heads=1, mlp_mult=2.0, num_loops=1, loop_start=1,
  loop_end=1, parallel_start_layer=2, rope_dims=8, tied_embed_init_std=0.5,
)  # fmt: skip

ADDED = dataclasses.replace(SMALL, value_residual=True, dense_skips=2)


@pytest.fixture(scope="module")
def params():
  """Of ADDED, which has all of SMALL."""
  params = parameters.init(ADDED, jax.random.key(0))
  keys = jax.random.split(jax.random.key(1), len(params))
  return {n: p + 0.2 * jax.random.normal(k, p.shape) for (n, p), k in zip(params.items(), keys, strict=True)}


def test_the_record_has_its_published_size_and_order():
  assert parameters.count(RECORD) == 35_945_673
  assert layer_order(RECORD, False) == ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9, 10))
  assert layer_order(RECORD, True) == ((0, 1, 2, 3, 4, 5, 3, 4), (5, 3, 4, 5, 6, 7, 8, 9, 10))


def test_module_paths_are_the_names_of_the_recipe(params):
  assert parameter_names(SMALL) == set(parameters.shapes(SMALL))
  assert parameter_names(ADDED) == set(parameters.shapes(ADDED)) == set(params)


def test_initial_values():
  params = parameters.init(SMALL, jax.random.key(2))
  L = SMALL.num_layers
  for bank in (params["qo_bank"][:L], params["kv_bank"]):
    gram = jnp.einsum("bmk,bnk->bmn", bank, bank)
    np.testing.assert_allclose(gram, jnp.broadcast_to(jnp.eye(bank.shape[1]), gram.shape), atol=1e-5)
  up = params["mlp_up_bank"]
  np.testing.assert_allclose(jnp.einsum("bfd,bfe->bde", up, up), jnp.broadcast_to(jnp.eye(32), (L, 32, 32)), atol=1e-5)
  assert not params["qo_bank"][L:].any() and not params["mlp_down_bank"].any()
  assert float(params["softcap_pos"]) == 30.0 and (params["parallel_resid_lambdas"] == np.float32(1.1)).all()


def rows_of_documents(key):
  """Three documents in one row, the middle one drawn from `key`."""
  fixed = jax.random.randint(jax.random.key(7), (30,), 2, 64)
  middle = jax.random.randint(key, (13,), 2, 64)
  return jnp.concatenate([fixed[:11].at[0].set(1), middle.at[0].set(1), fixed[11:].at[0].set(1)])[None]


@pytest.mark.parametrize("config, dtype", [(SMALL, jnp.float32), (SMALL, jnp.bfloat16), (ADDED, jnp.bfloat16)])
def test_another_document_changes_nothing_to_the_bit(params, config, dtype):
  """Attention, smear gate and skips keep documents apart: what differs is only where the text differs."""

  @jax.jit
  def hidden(tokens):
    context = packed(tokens, bos_id=1, seq_len=16, looping=True, dtype=dtype)
    return bind(config, params)(tokens, context).hidden[0]

  a, b = (np.asarray(hidden(rows_of_documents(jax.random.key(k))), np.float32) for k in (1, 2))
  same = (a == b).all(axis=1)
  assert same[:11].all() and same[24:].all() and not same[12:24].all()


@pytest.mark.parametrize("config", [SMALL, ADDED])
def test_the_future_changes_nothing_to_the_bit(params, config):
  tokens = rows_of_documents(jax.random.key(1))
  other = tokens.at[0, 20:].set(5)
  nll = jax.jit(lambda t: packed_nll(bind(config, params), t, looping=True, seq_len=64, dtype=jnp.float32)[0])
  a, b = np.asarray(nll(tokens)), np.asarray(nll(other))
  assert (a[:19] == b[:19]).all() and not (a[20:] == b[20:]).all()


def test_a_long_document_is_cut_every_seq_len_tokens(params):
  tokens = jax.random.randint(jax.random.key(3), (1, 41), 2, 64)
  whole = packed_nll(bind(SMALL, params), tokens, looping=False, seq_len=20, dtype=jnp.float32)[0]
  # The second segment alone, with the token before it for the smear gate, which runs across the cut.
  start = segment_starts(tokens[:, :-1], bos_id=1, seq_len=20)
  assert start[0].tolist() == [0] * 20 + [20] * 20
  changed = tokens.at[0, 3].set(9)
  again = packed_nll(bind(SMALL, params), changed, looping=False, seq_len=20, dtype=jnp.float32)[0]
  assert (again[20:] == whole[20:]).all() and not (again[3:20] == whole[3:20]).all()


@pytest.mark.parametrize("switch", ["ln_scale", "smear_gate", "skip_gates", "sparse_attn_gate", "asym_logit_rescale"])
def test_every_switch_changes_the_model_and_still_runs(params, switch):
  config = dataclasses.replace(SMALL, **{switch: False})
  wanted = parameters.shapes(config)
  tokens = rows_of_documents(jax.random.key(1))
  score = lambda c, p: packed_nll(bind(c, p), tokens, looping=True, seq_len=16, evaluation=True, dtype=jnp.float32)  # noqa: E731
  off = score(config, {k: v for k, v in params.items() if k in wanted})
  assert np.isfinite(off).all() and not np.array_equal(off, score(SMALL, params))


def activations(config, params):
  """Every activation of a looped pass over a row of documents, by name."""

  @jax.jit
  def run(params, tokens):
    taps = {}
    context = packed(tokens, bos_id=1, seq_len=16, looping=True, dtype=jnp.float32)
    bind(config, params)(tokens, context._replace(tap=taps.__setitem__))
    return taps

  return jax.tree.map(np.asarray, run(params, rows_of_documents(jax.random.key(1))))


def test_the_first_layers_values_join_those_of_later_uses(params):
  config = dataclasses.replace(SMALL, value_residual=True)
  plain, mixed = activations(SMALL, params), activations(config, params)
  np.testing.assert_allclose(mixed["00.blocks.0.v"], plain["00.blocks.0.v"], atol=1e-6)
  share = params["value_shares"][1]
  wanted = (1 - share) * plain["01.blocks.1.v"] + share * plain["00.blocks.0.v"]
  np.testing.assert_allclose(mixed["01.blocks.1.v"], wanted, rtol=1e-4, atol=1e-5)
  assert np.abs(wanted - plain["01.blocks.1.v"]).max() > 0.1
  still = activations(config, params | {"value_shares": jnp.zeros(3)})
  np.testing.assert_allclose(still["hidden"], plain["hidden"], atol=1e-5)


def test_dense_skips_add_outputs_weighted_by_token(params):
  config = dataclasses.replace(SMALL, dense_skips=2)
  assert config.dense_sources == (0, 1)
  plain, added = activations(SMALL, params), activations(config, params)
  sources = [plain[name] for name in ("embedding", "00.blocks.0.x", "02.blocks.1.x")]
  x = 0.5 * (plain["03.blocks.2.lane0"] + plain["03.blocks.2.lane1"])
  normed = lambda x: x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-7)  # noqa: E731
  gates = normed(x) @ np.asarray(params["dense_skip_weights"]).T / 32**0.5 + np.asarray(params["dense_skip_biases"])
  wanted = normed(x + sum(gates[..., s, None] * source for s, source in enumerate(sources)))
  np.testing.assert_allclose(added["hidden"], wanted, rtol=1e-3, atol=1e-4)
  first = params | {name: jnp.zeros(params[name].shape) for name in ("dense_skip_weights", "dense_skip_biases")}
  np.testing.assert_allclose(activations(config, first)["hidden"], plain["hidden"], atol=1e-5)


def test_what_is_added_leaves_the_other_first_values_alone():
  with_them, without = (parameters.init(config, jax.random.key(2)) for config in (ADDED, SMALL))
  assert all(np.array_equal(with_them[name], value) for name, value in without.items())
  assert (with_them["value_shares"] == 0.5).all() and not with_them["dense_skip_weights"].any()


def test_wrong_parameters_are_refused_by_name(params):
  params = {name: params[name] for name in parameters.shapes(SMALL)}
  parameters.check(SMALL, params)
  with pytest.raises(UserError, match="kv_bank is missing"):
    parameters.check(SMALL, {k: v for k, v in params.items() if k != "kv_bank"})
  with pytest.raises(UserError, match="extra is not a parameter"):
    parameters.check(SMALL, {**params, "extra": jnp.zeros(1)})
  with pytest.raises(UserError, match=r"smear_lambda has the shape \(2,\)"):
    parameters.check(SMALL, {**params, "smear_lambda": jnp.zeros(2)})

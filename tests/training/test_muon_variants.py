"""Muon's variants by laws that they obey and the recipe does not: columns, heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import MODEL, SEQ_LEN, params, rows, settings  # noqa: F401

from pgolf_jax.errors import UserError
from pgolf_jax.runtime.distributed import data_mesh
from pgolf_jax.settings import ModelConfig, OptimizerConfig, Settings, check
from pgolf_jax.settings.load import changed
from pgolf_jax.training import optimizer as optimizers
from pgolf_jax.training.step import TrainStep

HEADS = ModelConfig(num_layers=2, model_dim=32, num_heads=4, num_kv_heads=2, mlp_mult=1.0, vocab_size=8)


def directions(grads, model=HEADS, **changes):
  """Muon's first directions for the gradients of some banks."""
  config = OptimizerConfig(muon_dtype="float32", **changes)
  muon = optimizers.scale_by_muon(
    dtype=jnp.float32, row_normalize=config.muon_row_normalize, column_normalize=config.muon_column_normalize,
    groups=optimizers.head_groups(config, model),
  )  # fmt: skip
  grads = jax.tree.map(jnp.asarray, grads)
  return jax.tree.map(np.asarray, muon.update(grads, muon.init(grads), momentum=0.9)[0])


@pytest.fixture
def grads():
  rng = np.random.default_rng(0)
  return {
    "qo_bank": rng.standard_normal((4, 32, 32), np.float32),
    "kv_bank": rng.standard_normal((4, 16, 32), np.float32),
  }


@pytest.mark.parametrize("rows_too", [False, True])
def test_normalised_columns_make_their_scale_irrelevant(grads, rows_too):
  other = {name: g * np.float32(2.0) ** np.arange(-8, 8).repeat(2) for name, g in grads.items()}
  plain = {"muon_row_normalize": False}
  for a, b in zip(*(directions(g, **plain, muon_column_normalize=True).values() for g in (grads, other)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  for a, b in zip(*(directions(g, **plain).values() for g in (grads, other)), strict=True):
    assert np.abs(a - b).max() > 0.1
  if rows_too:  # the rows come first
    by_rows = {name: g / np.linalg.norm(g, axis=-1, keepdims=True) for name, g in grads.items()}
    wanted = directions(by_rows, **plain, muon_column_normalize=True)
    for name, d in directions(grads, muon_column_normalize=True).items():
      np.testing.assert_allclose(d, wanted[name], atol=1e-5)


@pytest.mark.parametrize("heads, kinds", [(1, "qk"), (2, "q"), (2, "qkv"), (1, "v")])
def test_heads_of_another_group_have_no_part_in_an_update(grads, heads, kinds):
  other = {name: g.copy() for name, g in grads.items()}
  for g in other.values():
    g[:, : heads * HEADS.head_dim] *= -3.0  # the first group alone
    g[:, 0] += 1.0
  a, b = (directions(g, muon_heads=heads, muon_heads_of=kinds) for g in (grads, other))
  whole = directions(grads)
  for bank, pair in (("qo_bank", "qo"), ("kv_bank", "kv")):
    for kind, first in zip(pair, (0, 2), strict=True):
      here = slice(first, first + 2)
      rest = (here, slice(heads * HEADS.head_dim, None))
      if kind in kinds:
        np.testing.assert_allclose(a[bank][rest], b[bank][rest], atol=1e-6)
        if heads * HEADS.head_dim < a[bank].shape[1]:
          assert np.abs(a[bank][here] - whole[bank][here]).max() > 0.01
          assert np.abs(a[bank][here][:, 0] - b[bank][here][:, 0]).max() > 0.01
      else:
        np.testing.assert_allclose(a[bank][here], whole[bank][here], atol=1e-6)


@pytest.mark.slow
def test_devices_share_them_like_one(params, rows):  # noqa: F811
  given = settings(clip_scope="global", muon_heads=1, muon_column_normalize=True)
  states = []
  for devices in (1, 8):
    step = TrainStep(given, data_mesh(jax.devices()[:devices]))
    state, _ = step.lower(SEQ_LEN, looping=True).compile()(step.init(params), step.inputs(rows, 0.7, 0.9))
    states.append(jax.tree.map(np.asarray, state.params))
  for name, before in params.items():
    change = np.linalg.norm(states[0][name] - before)
    assert np.linalg.norm(states[1][name] - states[0][name]) <= 1e-3 * change, name


def test_heads_that_do_not_divide_are_refused():
  given = changed(Settings(), {"optimizer.muon_heads": 8})
  with pytest.raises(UserError, match=r"muon_heads=8 must divide the 4 heads of k .*; 4 does"):
    check.check(given)
  check.check(changed(given, {"optimizer.muon_heads_of": "q"}))

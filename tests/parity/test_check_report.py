"""What `check` finds beside errors: where two forward passes part, how far distributions are apart, and float64."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from pgolf_jax.cli import main
from pgolf_jax.errors import UserError
from pgolf_jax.model import packed
from pgolf_jax.model.gpt import bind
from pgolf_jax.parity import Case
from pgolf_jax.parity.check import Column, Report, check, distributions, examine, forward_order
from pgolf_jax.parity.double import in_double
from pgolf_jax.parity.table import as_json, environment, text
from pgolf_jax.parity.tolerances import Floor


def forward_case(expected: dict) -> Case:
  case = Case(Path("a-case"), {"kind": "forward"})
  case.__dict__["expected"] = expected
  return case


def test_activations_are_compared_in_the_order_of_the_forward_pass():
  taps = []
  tokens = jnp.array([[1, 5, 6, 7, 1, 9, 9, 8]])
  context = packed(tokens, bos_id=1, seq_len=8, looping=True, dtype=jnp.float32)
  context = context._replace(tap=lambda name, x: taps.append(f"loop1/activations/{name}"))
  params = {name: jnp.asarray(value) for name, value in tiny_model.random_params().items()}
  jax.eval_shape(lambda params: bind(tiny_model.MODEL, params)(tokens, context).hidden, params)
  assert len(taps) == len(set(taps)) == 31  # embedding, hidden, 7 of each of 4 uses, one of which has two lanes
  whole = [*taps, "loop1/logits", "loop1/loss", "loop1/grads/blocks.1.attn_scale", "loop1/grads/blocks.0.attn_scale"]
  whole += ["loop1/grads/smear_lambda", "loop1/grads/tok_emb.weight"]
  assert sorted(sorted(whole), key=functools.partial(forward_order, "forward")) == whole


def test_the_first_to_diverge_is_the_earliest_and_not_the_worst():
  names = ["embedding", "00.blocks.0.q", "10.blocks.3.q", "hidden"]
  x = np.ones((4, 2), np.float32)
  case = forward_case({f"loop1/activations/{name}": x for name in reversed(names)})
  wrong = dict(case.expected) | {
    "loop1/activations/10.blocks.3.q": x + 1,
    "loop1/activations/00.blocks.0.q": x + 1e-3,
    "loop1/activations/hidden": x + 50,
  }
  column = Column("float32", check(case, wrong), [])
  assert column.first.name == "loop1/activations/00.blocks.0.q"
  assert column.first.ulps == pytest.approx(1e-3 * 2**23, rel=1e-3)
  told = text(Report(case, [column], None, 0.0))
  assert "First to diverge, in forward order: loop1/activations/00.blocks.0.q" in " ".join(told.split())
  assert check(case, dict(case.expected))[0].name == "loop1/activations/embedding"


def test_an_entry_of_a_curve_is_named():
  case = Case(Path("a-case"), {"kind": "train"})
  losses = np.linspace(6.0, 5.0, 10)
  case.__dict__["expected"] = {"train_loss": losses}
  rows = check(case, {"train_loss": losses + np.where(np.arange(10) >= 7, 0.01, 0.0)})
  assert rows[0].place == "train_loss[7]"


def test_distributions_give_divergence_and_flips():
  p = np.array([[0.7, 0.3], [0.5, 0.5], [0.9, 0.1]])
  q = np.array([[0.7, 0.3], [0.5, 0.5], [0.2, 0.8]])
  (found,) = distributions({"loop0/logits": np.log(q) + 3}, {"loop0/logits": np.log(p)})
  kl = 0.9 * np.log(0.9 / 0.2) + 0.1 * np.log(0.1 / 0.8)
  assert (found.largest_kl, found.mean_kl) == pytest.approx((kl, kl / 3))
  assert (found.flips, found.tokens) == (1, 3)


def test_a_floor_of_the_reference_is_taken_from_the_case():
  case = Case(Path("a-case"), {"kind": "forward", "floor": {"loop0/loss": 3e-7}}, dtype="bfloat16")
  case.__dict__["expected"] = {"loop0/loss": np.ones(1, np.float32)}
  (row,) = check(case, case.expected, {name: Floor(value, 0.0) for name, value in case.floor.items()})
  assert row.floor == 3e-7 and row.limit == pytest.approx(6 * 3e-7 * 2**-8 / 1e-7)


def test_a_program_is_carried_out_in_float64():
  def program(x, index):
    def body(carry, row):
      return carry * jnp.float32(0.5) + row.sum(), carry

    total, seen = jax.lax.scan(body, jnp.float32(1), x)
    total = jax.lax.fori_loop(0, 3, lambda i, t: t + jnp.sin(t) / 3, total)
    total = jax.lax.cond(total > 0, lambda t: jnp.sqrt(t), lambda t: -t, total)
    table = jnp.zeros(4).at[index].add(x[:, 0])
    return {"total": total, "seen": seen, "table": table, "square": jax.jit(lambda m: m @ m.T)(x)}

  rng = np.random.default_rng(0)
  x, index = rng.random((5, 3)).astype(np.float32), np.array([0, 1, 1, 3, 3])
  found = in_double(program, x, index)
  wide = x.astype(np.float64)
  total = 1.0
  for row in wide:
    total = total * 0.5 + row.sum()
  for _ in range(3):
    total = total + np.sin(total) / 3
  table = np.zeros(4)
  np.add.at(table, index, wide[:, 0])
  assert found["total"].dtype == np.float64
  for name, value in {"total": np.sqrt(total), "table": table, "square": wide @ wide.T}.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-14, err_msg=name)
  assert not np.allclose(np.asarray(jax.jit(program)(x, index)["total"]), np.sqrt(total), rtol=1e-14)


def test_a_derivative_is_carried_out_in_float64():
  gradient = in_double(jax.grad(lambda x: jnp.sum(jax.nn.softmax(x) * jnp.arange(3.0))), np.float32([1, 2, 3]))
  p = np.exp([1.0, 2, 3]) / np.exp([1.0, 2, 3]).sum()
  np.testing.assert_allclose(gradient, p * (np.arange(3) - p @ np.arange(3)), rtol=1e-14)


def test_float64_is_refused_where_it_would_be_float32(small_golden):
  with pytest.raises(UserError, match="float64 is for cases of the kinds forward and optimizer"):
    examine(Case.load(small_golden("train")), "float64")


def test_everything_that_was_found_is_json(small_golden, tmp_path, capsys):
  path = tmp_path / "found.json"
  assert main(["parity", "check", str(small_golden("ngram")), "--json", str(path)]) == 0
  found = json.loads(path.read_text())
  assert found["agree"] and {"versions", "device", "flags"} <= found.keys()
  (case,) = found["cases"]
  assert case["kind"] == "ngram" and case["columns"]["exact"]["first_to_diverge"] is None
  assert [t["name"] for t in case["columns"]["exact"]["tensors"]] == ["gate_mask", "hint_ids", "boost"]
  assert all(len(line) <= 80 for line in capsys.readouterr().out.splitlines())
  column = Column("float32", check(forward_case({"loop0/loss": np.ones(1)}), {}), [])
  json.dumps(as_json([Report(forward_case({}), [column], None, 0.0)], environment()), allow_nan=False)

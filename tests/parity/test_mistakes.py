"""Every planted mistake is caught by the case that is named for it, at the right tensor; docs/parity.md says so."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from mistakes import MISTAKES, Mistake

from pgolf_jax.parity import Case
from pgolf_jax.parity import run as parity_run
from pgolf_jax.parity.check import Row, check
from pgolf_jax.quantize.gptq import gptq
from pgolf_jax.training.step import forget_programs

GOLDEN = Path(__file__).parents[1] / "golden"
PAGE = (Path(__file__).parents[2] / "docs" / "parity.md").read_text(encoding="utf-8")
CHEAP = [m for m in MISTAKES if m.case in ("forward", "ngram") and not m.gradients]
LONGER = [m for m in MISTAKES if m not in CHEAP]


@pytest.fixture(autouse=True)
def _programs_are_made_anew(monkeypatch):
  """A program that was compiled with a mistake is not used without it, nor the other way round."""
  _forget_programs()
  yield
  monkeypatch.undo()
  _forget_programs()


def _forget_programs() -> None:
  gptq.clear_cache()
  forget_programs()
  for cached in (parity_run._forward_program, parity_run._optimizer_program, parity_run._ttt_programs):
    cached.cache_clear()


def outcome(mistake: Mistake, patch: pytest.MonkeyPatch, folder: Path = GOLDEN) -> list[Row]:
  """The comparison of the mistake's case, in forward order, with the mistake planted."""
  _forget_programs()
  case = Case.load(folder / mistake.case)
  mistake.plant(patch, case)
  return compare(case, gradients=mistake.gradients)


def compare(case: Case, *, gradients: bool = False) -> list[Row]:
  """Short programs run operation by operation: compiling each mistake's own would take far longer."""
  if case.kind == "forward" and not gradients:
    return [row for row in check(case, looped_pass(case)) if re.match("loop1/(activations|logits)", row.name)]
  if case.kind in ("forward", "optimizer"):
    with jax.disable_jit():
      return check(case, parity_run.run(case))
  return check(case, parity_run.run(case))


def looped_pass(case: Case) -> dict:
  """The activations and logits of the looped forward pass alone."""
  tokens = jnp.asarray(case.inputs["tokens"], jnp.int32)[None]
  options = {"seq_len": case.about["max_doc_len"], "looping": True, "dtype": jnp.float32}
  params = {name: jnp.asarray(value) for name, value in case.under("params/").items()}
  with jax.disable_jit(), jax.default_matmul_precision("highest"):
    logits, activations = parity_run.forward_pass(case.settings.model, params, tokens, **options)
  return {"loop1/logits": logits} | {f"loop1/activations/{name}": value for name, value in activations.items()}


def assert_caught(mistake: Mistake, patch: pytest.MonkeyPatch) -> None:
  first = next((row for row in outcome(mistake, patch) if not row.ok), None)
  assert first is not None, "not caught"
  assert first.name.removeprefix("loop1/").removeprefix("activations/") == mistake.first
  said = on_the_page()[mistake.name]
  assert said[:2] == (mistake.case, f"`{mistake.first}`")
  assert same_size(said[2], over_limit(first)), (said[2], over_limit(first))


def over_limit(row: Row) -> str:
  """How far a row is beyond its limit, as the page says it."""
  if row.measure == "missing":
    return "missing"
  return f"{row.error:.0f} entries" if row.limit == 0 else f"{row.error / row.limit:.1e} ×"


def same_size(a: str, b: str) -> bool:
  """Whether two sizes on the page are the same within a factor of two, which another machine may make."""
  (x, *unit_a), (y, *unit_b) = a.split(), b.split()
  return unit_a == unit_b and (x == y if not unit_a else 0.5 <= float(x) / float(y) <= 2)


def on_the_page() -> dict[str, tuple[str, ...]]:
  """Mistake → (case, first tensor, size) in the page's table."""
  table = PAGE[PAGE.index("| mistake |") :].split("\n\n")[0].splitlines()[2:]
  rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table]
  return {name: tuple(rest) for name, *rest in rows}


def test_the_page_lists_every_mistake_and_no_other():
  assert list(on_the_page()) == [mistake.name for mistake in MISTAKES]
  assert f"{len(MISTAKES)} mistakes are planted" in PAGE


def test_the_page_names_every_case_that_ships():
  assert [path.parent.name for path in GOLDEN.glob("*/case.json") if f"| `{path.parent.name}` |" not in PAGE] == []


@pytest.mark.parametrize("case", ["forward", "ngram"])
def test_without_a_mistake_the_cases_agree(case):
  rows = compare(Case.load(GOLDEN / case))
  assert rows and all(row.ok for row in rows)


@pytest.mark.parametrize("mistake", CHEAP, ids=lambda m: m.name)
def test_is_caught(mistake, monkeypatch):
  assert_caught(mistake, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", LONGER, ids=lambda m: m.name)
def test_is_caught_by_longer_cases(mistake, monkeypatch):
  assert_caught(mistake, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["forward_long", "optimizer", "quantize", "train_schedule", "ttt_small"])
def test_without_a_mistake_the_longer_cases_agree(case):
  rows = compare(Case.load(GOLDEN / case))
  assert rows and all(row.ok for row in rows)

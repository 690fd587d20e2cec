"""The dispatch: what it takes, why, and how `prefer` and `implementation` change that."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pgolf_jax import kernels
from pgolf_jax.kernels import leaky_relu2_mlp as mlp
from pgolf_jax.kernels import operation
from pgolf_jax.kernels import polar_express as polar

ROOT = Path(operation.__file__).parent
FOLDERS = sorted(file.parent.name for file in ROOT.glob("*/__init__.py"))
OPERATIONS = {
  name: module.OPERATION
  for name in FOLDERS
  if hasattr(module := importlib.import_module(f"pgolf_jax.kernels.{name}"), "OPERATION")
}
MLP = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((128, 128), (256, 128), (128, 256))]


def choose(implementation=None):
  return mlp.OPERATION.choose(*MLP, slope=0.3, implementation=implementation)


def test_every_folder_but_the_n_gram_counts_has_an_operation_of_its_name():
  assert OPERATIONS.keys() == set(FOLDERS) - {"ngram"} and len(OPERATIONS) >= 4
  assert all(name == api_operation.name for name, api_operation in OPERATIONS.items())


@pytest.mark.parametrize("name", OPERATIONS)
def test_backends_are_the_modules_in_the_folder_in_the_common_order(name):
  backends = OPERATIONS[name].backends
  assert set(backends) == {file.stem for file in (ROOT / name).glob("*.py")} & set(operation.BACKENDS)
  assert list(backends) == sorted(backends, key=operation.BACKENDS.index)
  assert {"xla", "reference"} <= set(backends), "one for every platform, and one to compare with"


@pytest.mark.parametrize("name", OPERATIONS)
def test_all_backends_checks_and_obstacles_of_an_operation_have_one_signature(name):
  def parameters(f):
    return [(p.name, p.kind) for p in inspect.signature(f).parameters.values()]

  one = parameters(OPERATIONS[name].check)
  for backend in OPERATIONS[name].backends:
    module = importlib.import_module(f"pgolf_jax.kernels.{name}.{backend}")
    assert parameters(getattr(module, name)) == one
    if hasattr(module, "obstacle"):
      assert parameters(module.obstacle) == one


def test_takes_the_first_backend_that_is_possible(pretend_hopper, pretend_tpu):
  with pretend_hopper():
    assert choose() == kernels.Choice("mosaic_gpu", "the first choice")
  with pretend_tpu():
    assert choose().name == "mosaic_tpu"
    assert choose().reason == "mosaic_gpu not possible: it needs a Hopper GPU, not TPU v5 lite (tpu)"
  assert choose().name == "xla"


def test_takes_what_is_preferred_where_it_is_possible(pretend_hopper):
  with pretend_hopper():
    with kernels.prefer("xla"):
      assert choose() == kernels.Choice("xla", "preferred")
      with kernels.prefer("reference", "xla"):
        assert choose().name == "reference"
      assert choose().name == "xla"
      assert choose("mosaic_gpu") == kernels.Choice("mosaic_gpu", "asked for")
    assert choose().name == "mosaic_gpu"
    with kernels.prefer("mosaic_tpu"):
      assert choose().name == "mosaic_gpu" and "mosaic_tpu not possible: it needs a TPU" in choose().reason
  with kernels.prefer("mosaic_gpu"):
    assert polar.OPERATION.choose(jnp.zeros((1, 4, 4)), steps=5) == kernels.Choice("xla", "the first choice")


def test_a_function_traced_outside_is_traced_again_inside():
  x, up, down = jnp.ones((2, 4)), jnp.ones((8, 4)), jnp.ones((4, 8))
  taken = []

  @jax.jit
  def f(x):
    taken.append(mlp.OPERATION.choose(x, up, down, slope=0.3).name)
    return mlp.leaky_relu2_mlp(x, up, down, slope=0.3)

  f(x)
  with kernels.prefer("reference"):
    f(x)
  f(x)
  with kernels.prefer("reference"):
    f(x)
  assert taken == ["xla", "reference"]


def test_refuses_names_that_it_does_not_know():
  with (
    pytest.raises(ValueError, match=r"'triton' is not a backend; choose from mosaic_gpu, .*, reference"),
    kernels.prefer("triton"),
  ):
    pass
  with pytest.raises(ValueError, match="polar_express has no implementation='mosaic_gpu'; it has xla, reference"):
    polar.polar_express(jnp.zeros((1, 4, 4)), implementation="mosaic_gpu")


def test_says_all_reasons_where_nothing_is_possible():
  only_kernels = operation.Operation("leaky_relu2_mlp", mlp.OPERATION.check, ("mosaic_gpu", "mosaic_tpu"))
  with pytest.raises(ValueError, match=r"no implementation is possible: mosaic_gpu .* Hopper GPU.*; mosaic_tpu .* TPU"):
    only_kernels.choose(*MLP, slope=0.3)


def test_pallas_is_not_imported_where_it_is_not_used():
  """It would take a second of every start on a CPU."""
  program = """
import sys, jax.numpy as jnp
from pgolf_jax.kernels.leaky_relu2_mlp import leaky_relu2_mlp
leaky_relu2_mlp(jnp.ones((2, 4)), jnp.ones((8, 4)), jnp.ones((4, 8)), slope=0.3)
assert not any("pallas.mosaic_gpu" in name or "pallas.tpu" in name for name in sys.modules)
"""
  subprocess.run([sys.executable, "-c", program], check=True)

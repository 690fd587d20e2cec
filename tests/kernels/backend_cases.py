"""The test that every backend of every operation passes: forward and gradient against the reference in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from pgolf_jax.kernels import Operation


class BackendCases:
  """A subclass for an operation says how to call it; a subclass of that for a backend says at which shapes and types.

  Attributes:
    operation: what is tested.
    results: names of what the operation returns, then of the gradients of its first arguments.
    differentiated: how many of the arguments have a gradient.
    static: names of the options that are not traced.
    implementation: the backend.
    dtype: of the arguments; integers and what the operation says is float32 stay.
    float32: results and gradients that are float32 whatever the type of the arguments.
    optional: gradients of arguments that may be left out; then there are none.
    tolerance: of the distance from the reference, relative to the reference's norm.
    examples: how many random cases are tried.
  """

  operation: Operation
  results: tuple[str, ...]
  differentiated: int
  static: tuple[str, ...] = ()
  implementation: str
  dtype = jnp.bfloat16
  float32: tuple[str, ...] = ()
  optional: tuple[str, ...] = ()
  tolerance = 1e-2
  examples = 2

  @classmethod
  def cases(cls):
    """Returns a hypothesis strategy of (arguments, cotangents of the results, options)."""
    raise NotImplementedError

  @pytest.fixture(scope="class")
  @classmethod
  def backend(cls, run):
    """backend(arguments, cotangents, options) → results and gradients, from the class's backend."""
    return run(with_gradient(cls, implementation=cls.implementation), cls.static)

  def test_agrees_with_the_reference_in_float32(self, backend):
    reference = jax.jit(with_gradient(type(self), implementation="reference"), static_argnames=self.static)

    @settings(max_examples=self.examples, deadline=None)
    @given(self.cases())
    def check(case):
      arguments, cotangents, options = case
      self.compare(backend(arguments, cotangents, **options), reference(*jax.tree.map(wide, case[:2]), **options))

    check()

  def compare(self, got, want):
    for name, g, w in zip(self.results, got, want, strict=True):
      if w is None:
        assert g is None and name in self.optional, name
        continue
      assert g.dtype == (jnp.float32 if name in self.float32 else self.dtype), name
      assert distance(g, w) < self.tolerance, name


def with_gradient(cases: type[BackendCases], **chosen):
  """Returns f(arguments, cotangents, **options) → the operation's results and the gradients, in one tuple."""

  def both(arguments, cotangents, **options):
    first, rest = arguments[: cases.differentiated], arguments[cases.differentiated :]
    results, pull = jax.vjp(lambda *first: cases.operation(*first, *rest, **chosen, **options), *first)
    gradients = pull(jax.tree.map(lambda d, result: d.astype(result.dtype), cotangents, results)) if first else ()
    return *jax.tree.leaves(results), *gradients

  return both


def wide(x):
  """Returns floating numbers in float32, and integers as they are."""
  return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def distance(got, want) -> float:
  """Returns the norm of the difference over the norm of what is right."""
  return float(np.linalg.norm(np.asarray(got, np.float32) - want) / np.linalg.norm(want))


def backends_under_test(cases: type[BackendCases]) -> set[str]:
  """Returns the backends for which the class has subclasses."""
  below = cases.__subclasses__()
  here = {c.implementation for c in below if hasattr(c, "implementation")}
  return here.union(*(backends_under_test(c) for c in below))

"""Annotations of arrays are checked while the tests run."""

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jaxtyping import Array, Float, Int, jaxtyped
from shapes import check_shapes

from pgolf_jax.kernels.polar_express import polar_express
from pgolf_jax.model.gpt import packed_nll


@jaxtyped(typechecker=check_shapes)
def total(x_BxT: Float[Array, "B T"], rows_B: Int[Array, "B"] | None = None, axis=1) -> Float[Array, "B"]:
  return jnp.sum(x_BxT, axis=axis)


def test_arrays_of_both_kinds_pass():
  total(jnp.ones((2, 3)))
  total(np.ones((2, 3), np.float32), np.ones(2, np.int32))


@pytest.mark.parametrize(
  "arguments",
  [
    (jnp.ones(3),),
    (jnp.ones((2, 3), jnp.int32),),
    (jnp.ones((2, 3)), jnp.ones(3, jnp.int32)),
    (np.ones((2, 3), np.float32), np.ones(3, np.int32)),
    (jnp.ones((2, 3)), None, 0),  # the result has the wrong shape
  ],
)
def test_a_wrong_shape_or_type_is_refused(arguments):
  with pytest.raises(jaxtyping.TypeCheckError):
    total(*arguments)


def test_the_code_under_test_is_checked():
  with pytest.raises(jaxtyping.TypeCheckError):
    polar_express(jnp.ones(3), steps=1)
  with pytest.raises(jaxtyping.TypeCheckError):
    packed_nll(None, jnp.ones((2, 3)), looping=False, seq_len=4, dtype=jnp.float32)

"""The shared arithmetic against NumPy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pgolf_jax.kernels import numerics

Z = np.float32([-200, -30, -1e-3, 0, 1e-3, 7, 30, 200])


def test_softcap_takes_one_cap_above_zero_and_the_other_elsewhere():
  want = [c * np.tanh(z / c) for z, c in zip(np.float64(Z), [12] * 4 + [30] * 4, strict=True)]
  np.testing.assert_allclose(numerics.softcap(Z, 30.0, 12.0), want, rtol=1e-6)


@pytest.mark.parametrize("inverse", [None, numerics.BySign(1 / 30, 1 / 12)])
def test_softcap_hands_over_its_tanh_and_takes_inverse_caps(inverse):
  capped, tanh = numerics.softcap_and_tanh(Z, numerics.BySign(30.0, 12.0), inverse)
  np.testing.assert_allclose(tanh, np.tanh(Z / np.where(Z > 0, 30, 12)), rtol=1e-6)
  np.testing.assert_allclose(capped, numerics.softcap(Z, 30.0, 12.0), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_rounding_is_that_of_the_type_in_spite_of_fusion(dtype):
  x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
  got = jax.jit(lambda x: numerics.rounded(x, dtype).astype(jnp.float32) - x)(x)
  np.testing.assert_array_equal(got, x.astype(dtype).astype(np.float32) - x)


def test_product_sums_in_float32_and_rounds_once():
  a = np.full((1, 512), 1 + 2**-7).astype(ml_dtypes.bfloat16)
  got = numerics.product("mk,nk->mn", jnp.asarray(a), jnp.asarray(a))
  assert got.dtype == jnp.bfloat16
  assert got[0, 0] == np.float32(512 * (1 + 2**-7) ** 2).astype(ml_dtypes.bfloat16)

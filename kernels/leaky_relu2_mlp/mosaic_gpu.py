"""The LeakyReLU² MLP's two fused products for Hopper GPUs, in Pallas' Mosaic GPU.

Both are persistent, warp-specialised matrix products: one warpgroup keeps copies in flight, and two multiply, each
one half of a tile's columns. Two thread blocks of a cluster work on the same columns at a time, so that one copy of the
weights serves both. The epilogue applies the activation or its derivative to the float32 sums in registers, which saves
a pass over [N, F] through memory. Each product has a jit around it, so that a model of many layers traces and lowers it
once.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pgolf_jax.kernels import hardware, hopper
from pgolf_jax.kernels.leaky_relu2_mlp import with_gradient

_TILE_N = 128
"""Tokens in a tile."""
_TILE_F = 256
"""Columns in a tile, half of them for each of the two multiplying warpgroups."""
_HALF = _TILE_F // 2
_CLUSTER = 2
"""Thread blocks that work on tiles of the same columns side by side."""
_TILE_D = 64
"""Terms summed in one step: the 16-bit numbers in one 128-byte swizzle."""
_STAGES = 3
"""Copies in flight: as many as fit into 227 KiB of shared memory beside the epilogue's buffers."""
_COPYING = 2
"""Index of the warpgroup that keeps copies in flight; the warpgroups before it multiply."""
_PATCH = 64
"""Rows and columns of the patches in which the epilogue works."""
_PATCHES = [(slice(n, n + _PATCH), slice(f, f + _PATCH)) for n in (0, 64) for f in (0, 64)]


def obstacle(x_NxD, up_FxD, down_DxF, *, slope: float) -> str | None:
  """Returns why this backend cannot compute the operation for these shapes and types, or None."""
  if x_NxD.dtype not in (jnp.bfloat16, jnp.float16):
    return f"it needs bfloat16 or float16, not {x_NxD.dtype}"
  f, d = up_FxD.shape
  if d % _TILE_D or f % _TILE_F:
    return f"it needs D divisible by {_TILE_D} and F by {_TILE_F}, not D={d} and F={f}"
  return None


@functools.partial(jax.jit, static_argnames="slope")
def up(x_NxD: jax.Array, up_FxD: jax.Array, *, slope: float) -> tuple[jax.Array, jax.Array]:
  """Returns u = up · x and φ(u); see `with_gradient`. Any number of tokens is padded to tiles for whole clusters."""
  n, f, dtype = x_NxD.shape[0], up_FxD.shape[0], x_NxD.dtype

  def epilogue(acc, rows, columns, half, refs):
    u_ref, a_ref, u_smem, a_smem = refs
    for i, (patch_rows, patch_columns) in enumerate(_PATCHES):
      slot = i % 2
      plgpu.wait_smem_to_gmem(1, wait_read_only=True)
      u = acc[patch_rows, patch_columns].astype(dtype)
      u_smem[half, slot] = u
      # The slope is at most 1, so LeakyReLU is the greater of u and slope·u.
      leaky = jnp.maximum(u.astype(jnp.float32), slope * u.astype(jnp.float32))
      a_smem[half, slot] = (leaky * leaky).astype(dtype)
      plgpu.commit_smem()
      for smem, ref in ((u_smem, u_ref), (a_smem, a_ref)):
        patch = ref.at[rows, columns].at[patch_rows, patch_columns]
        plgpu.copy_smem_to_gmem(smem.at[half, slot], patch, commit_group=False)
      plgpu.commit_smem_to_gmem_group()

  patches = plgpu.SMEM((2, 2, _PATCH, _PATCH), dtype, transforms=hopper.TILED)
  x = _whole_tiles(x_NxD)
  hidden = jax.ShapeDtypeStruct((x.shape[0], f), dtype)
  u_NxF, a_NxF = _fused_product(x, up_FxD.T, outputs=(hidden, hidden), scratch=(patches, patches), epilogue=epilogue)
  return u_NxF[:n], a_NxF[:n]


@functools.partial(jax.jit, static_argnames="slope")
def up_gradient(dy_NxD: jax.Array, down_DxF: jax.Array, u_NxF: jax.Array, *, slope: float) -> jax.Array:
  """Returns the cotangent of u; see `with_gradient`.

  A tile of u is fetched while the product runs and overwritten with the result.
  """
  n, f, dtype = dy_NxD.shape[0], down_DxF.shape[1], dy_NxD.dtype

  def prologue(rows, columns, half, refs):
    u_ref, _, u_smem, arrived = refs
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.copy_gmem_to_smem(u_ref.at[rows, columns], u_smem.at[half], arrived.at[half])

  def epilogue(acc, rows, columns, half, refs):
    _, du_ref, u_smem, arrived = refs
    plgpu.barrier_wait(arrived.at[half])
    for patch in _PATCHES:
      u = u_smem.at[half].at[patch][...].astype(jnp.float32)
      slope_of_phi = 2 * jnp.maximum(u, slope * slope * u)
      u_smem.at[half].at[patch][...] = (acc[patch] * slope_of_phi).astype(dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(u_smem.at[half], du_ref.at[rows, columns])

  dy, u = _whole_tiles(dy_NxD), _whole_tiles(u_NxF)
  tiles = plgpu.SMEM((2, _TILE_N, _HALF), dtype, transforms=hopper.TILED)
  (du_NxF,) = _fused_product(
    dy,
    down_DxF,
    u,
    outputs=(jax.ShapeDtypeStruct((dy.shape[0], f), dtype),),
    scratch=(tiles, plgpu.Barrier(num_barriers=2)),
    prologue=prologue,
    epilogue=epilogue,
  )
  return du_NxF[:n]


def _whole_tiles(x: jax.Array) -> jax.Array:
  return jnp.pad(x, ((0, -x.shape[0] % (_CLUSTER * _TILE_N)), (0, 0)))


def _fused_product(a_NxD, b_DxF, *operands, outputs, scratch, epilogue, prologue=lambda *_: None):
  """Computes a · b tile by tile and returns what the epilogue writes.

  Args:
    operands: further arrays that prologue and epilogue read.
    outputs: types of the arrays that the epilogue writes.
    scratch: shared memory and barriers, allocated once.
    epilogue: (float32 [_TILE_N, _HALF] sums, rows, columns, half, refs) → None, run by each multiplying warpgroup;
      rows and columns are the place of these sums in the product, half is the index of the warpgroup, and refs are
      the references to operands, outputs and scratch.
    prologue: (rows, columns, half, refs) → None, run before the tile's product.
  """
  n, d = a_NxD.shape
  f_tiles, d_steps = b_DxF.shape[1] // _TILE_F, d // _TILE_D
  turns = n // (_CLUSTER * _TILE_N) * f_tiles  # of a cluster
  shared = ("cluster",) if _CLUSTER > 1 else ()

  def pipeline(step, context):
    return plgpu.emit_pipeline_warp_specialized(
      step,
      grid=(d_steps,),
      in_specs=[
        plgpu.BlockSpec((_TILE_N, _TILE_D), lambda i: (0, i), transforms=hopper.TILED),
        plgpu.BlockSpec((_TILE_D, _TILE_F), lambda i: (i, 0), transforms=hopper.TILED, collective_axes=shared),
      ],
      max_concurrent_steps=_STAGES,
      num_compute_wgs=_COPYING,
      memory_registers=40,
      wg_axis="warpgroup",
      compute_context=context,
    )

  def kernel(a_ref, b_ref, *refs):
    half = lax.axis_index("warpgroup")
    allocations = pipeline(lambda *_: None, lambda *_: None).get_allocations(a_ref, b_ref)

    @functools.partial(pl.run_scoped, allocations=allocations, collective_axes="warpgroup")
    def _(allocations):
      @plgpu.nd_loop((turns,), collective_axes="block")
      def _(loop):
        # Columns move fastest, so that the clusters at work at one time share few rows of a and all of b in L2.
        n_tile = lax.div(loop.index[0], f_tiles) * _CLUSTER + lax.axis_index("cluster")
        f_tile = lax.rem(loop.index[0], f_tiles)
        rows = pl.ds(n_tile * _TILE_N, _TILE_N)
        columns = pl.ds(f_tile * _TILE_F + half * _HALF, _HALF)

        def context(run_pipeline):
          prologue(rows, columns, half, refs)

          @functools.partial(pl.run_scoped, acc_ref=plgpu.ACC((_TILE_N, _HALF), jnp.float32))
          def _(acc_ref):
            run_pipeline(acc_ref)
            epilogue(acc_ref[...], rows, columns, half, refs)

        def step(_, a_smem, b_smem, acc_ref):
          plgpu.wgmma(acc_ref, a_smem, b_smem.at[:, pl.ds(half * _HALF, _HALF)])
          plgpu.wgmma_wait(0)  # the pipeline takes the operands' place for others; the other warpgroup goes on
          return acc_ref

        pipeline(step, context)(
          a_ref.at[rows, :],
          b_ref.at[:, pl.ds(f_tile * _TILE_F, _TILE_F)],
          allocations=allocations,
        )

    plgpu.wait_smem_to_gmem(0)

  return plgpu.kernel(
    kernel,
    out_type=outputs,
    scratch_types=scratch,
    grid=(min(max(hardware.target().cores // _CLUSTER, 1), turns),),
    grid_names=("block",),
    cluster=(_CLUSTER,),
    cluster_names=("cluster",),
    num_threads=_COPYING + 1,
    thread_name="warpgroup",
    compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
  )(a_NxD, b_DxF, *operands)


leaky_relu2_mlp = with_gradient(up, up_gradient)

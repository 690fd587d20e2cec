"""The kernels' benchmark measures what it says."""

import ast
from pathlib import Path

import jax
import numpy as np
import pytest

from pgolf_jax import bench
from pgolf_jax.bench.kernels import RECORD, Sizes, cases, document_lengths, measure, segment_starts
from pgolf_jax.kernels.hardware import peaks
from pgolf_jax.plan import hlo


def test_measures_every_pass_of_every_possible_implementation():
  rows, notes = measure(("leaky_relu2_mlp", "polar_express"), tokens=64, max_segment=32, repeats=1)
  measured = {(row.way.labels["operation"], row.way.labels["pass"]) for row in rows if row.way.labels["by"] == "xla"}
  passes = [("leaky_relu2_mlp", "forward"), ("leaky_relu2_mlp", "forward + gradient"), ("polar_express", "forward")]
  assert measured == set(passes)
  assert all(row.median > 0 and row.way.work.flops > 0 and row.way.work.num_bytes > 0 for row in rows)
  assert not any(row.way.labels["by"] == "mosaic_gpu" for row in rows)
  assert any("it needs a Hopper GPU" in note for note in notes)
  assert any("no peak known" in note for note in notes) and all(row.roofline is None for row in rows)


def test_every_operation_is_the_same_in_pytorch():
  """Each case's result and gradient, at the sizes at which it is timed."""
  pytorch = pytest.importorskip("pgolf_jax.bench.torch_gpt", reason="PyTorch is not installed")
  start_BxT = np.tile(segment_starts(128, 64, [30, 1, 97]), (2, 1))
  for case in cases(start_BxT, 64, np.float32, RECORD._replace(matrices=1)):
    for gradient in (False, True) if case.differentiated else (False,):
      expected = case.jax_call("xla", gradient)()
      actual = case.torch_call(pytorch, "cpu", gradient)()
      for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        scale = np.abs(b).max()
        np.testing.assert_allclose(a.detach().numpy().reshape(b.shape), b, atol=1e-4 * scale, err_msg=case.name)


def test_what_is_timed_computes_the_operations_that_are_counted():
  """Result and gradients both. Attention over all pairs computes more than it needs, in equal parts of both passes."""
  start_BxT = segment_starts(128, 128, [128])[None]
  for case in cases(start_BxT, 128, np.float32, Sizes(D=64, F=128, V=256, H=4, K=2, C=16, matrices=1)):
    ratios = []
    for gradient in case.passes if case.flops[0] else ():
      # The reference's gradient of a chunk multiplies by keys and values of the ring, which get none.
      call = case.jax_call("xla" if case.name == "chunk_attention" else "reference", gradient)
      kernels = hlo.read(call.func.lower(*call.args).compile().as_text()).kernels
      ratios.append(sum(k.times * k.flops for k in kernels) / case.flops[gradient])
    every_pair = 128**2 / (128 * 129 / 2) if "attention" in case.name else 1.0
    assert ratios == pytest.approx([every_pair] * len(ratios), rel=0.01), case.name


def test_gradients_are_timed_with_the_result_and_from_random_arrays():
  start_BxT = segment_starts(32, 16)[None]
  (case,) = (c for c in cases(start_BxT, 16, np.float32, RECORD) if c.name == "softcapped_xent")
  result, (dz,) = case.jax_call("xla", True)()
  np.testing.assert_allclose(result, case.jax_call("xla", False)(), rtol=1e-6)
  from_ones = jax.grad(lambda z: case.call(z, case.arguments[1], implementation="xla").sum())(case.arguments[0])
  np.testing.assert_allclose(dz, from_ones * case.cotangents()[:, None], rtol=1e-5, atol=1e-6)


def test_segments_are_as_long_as_documents_and_never_longer_than_allowed():
  start = segment_starts(100_000, 2048)
  position = np.arange(100_000)
  assert start[0] == 0
  assert (np.diff(start) >= 0).all()
  assert (position - start < 2048).all()
  assert (start[start] == start).all()
  assert 500 < 100_000 / len(np.unique(start)) < 1300


def test_documents_are_as_long_as_real_ones():
  lengths = document_lengths(40_000_000)
  assert lengths.mean() == pytest.approx(957, rel=0.02) and np.median(lengths) == pytest.approx(621, rel=0.02)
  assert lengths.min() == 40 and lengths.sum() > 40_000_000
  for max_segment, keys in ((1024, 412), (2048, 649), (3072, 817)):  # seen in the validation set
    start = segment_starts(4_000_000, max_segment)
    assert (np.arange(4_000_000) - start + 1).mean() == pytest.approx(keys, rel=0.05)


def test_peaks_are_those_of_the_most_particular_name():
  assert peaks("NVIDIA H100 80GB HBM3").bytes_per_s == 3.35e12
  assert peaks("NVIDIA H100 PCIe").flops_per_s == 756e12
  assert peaks("TPU v5 lite").flops_per_s == 197e12
  assert peaks("cpu") is None


@pytest.mark.parametrize(("flops", "num_bytes", "seconds"), [(989e12, 1, 1.0), (1, 3.35e12, 1.0)])
def test_floor_is_the_longer_of_the_two_times(flops, num_bytes, seconds):
  assert peaks("H100").floor_s(flops, num_bytes) == pytest.approx(seconds)


def test_fused_pytorch_has_every_operation_that_is_timed():
  """Read, not imported: Triton is only where a GPU is."""
  folder = Path(bench.__file__).parent
  lambdas = [node for node in ast.walk(ast.parse((folder / "kernels.py").read_text())) if isinstance(node, ast.Lambda)]
  torch = [node.attr for each in lambdas for node in ast.walk(each) if is_torch(node)]
  assert len(set(torch)) > 5
  public = next(
    ast.literal_eval(node.value)
    for node in ast.parse((folder / "torch_triton.py").read_text()).body
    if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
  )
  assert set(torch) <= set(public)


def is_torch(node: ast.AST) -> bool:
  return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch"

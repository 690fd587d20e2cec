"""Kernels and bytes of compiled programs: small HLO texts and small programs whose figures are known exactly."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from pgolf_jax import plan
from pgolf_jax.cli import main
from pgolf_jax.kernels.chunk_attention import mosaic_gpu as chunk_attention
from pgolf_jax.kernels.leaky_relu2_mlp import mosaic_gpu as mlp
from pgolf_jax.kernels.segment_attention import mosaic_gpu as attention
from pgolf_jax.kernels.segment_attention import mosaic_tpu as attention_on_tpu
from pgolf_jax.model import flops
from pgolf_jax.plan import by_class, hardware, hlo
from pgolf_jax.plan.by_class import Conditions
from pgolf_jax.plan.hlo import Kernel
from pgolf_jax.settings import LengthStage, ModelConfig, Settings, TrainConfig, TTTConfig

H100 = Conditions("NVIDIA H100 80GB HBM3", devices=8, link=450e9, keys=400.0, layer_uses=2)


def only(text, **options) -> Kernel:
  (kernel,) = hlo.read(text, **options).kernels
  return kernel


def compiled(f, *shapes) -> hlo.Program:
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return hlo.read(jax.jit(f).lower(*arguments).compile().as_text())


def test_a_compiled_chain_of_operations_reads_and_writes_once():
  (kernel,) = compiled(lambda x, y: jnp.sin(x) * 2 + y, (64, 128), (64, 128)).kernels
  assert kernel[:5] == ("elementwise", 1, 2 * 64 * 128 * 4, 64 * 128 * 4, 0.0)


def test_a_compiled_loop_counts_as_often_as_it_turns():
  def f(x, w):
    return lax.scan(lambda x, _: (x @ w, None), x, None, length=5)[0]

  program = compiled(f, (256, 128), (128, 128))
  (product,) = [k for k in program.kernels if k.kind == "products"]
  assert product.times == 5 and product.flops == 2 * 256 * 128 * 128
  assert (product.read, product.written) == (4 * (256 * 128 + 128 * 128), 4 * 256 * 128)
  assert program.unknown_loops == 0


def test_products_of_batches_count_each_matrix_once():
  (product,) = compiled(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (3, 32, 64), (3, 64, 16)).kernels
  assert product.kind == "products" and product.flops == 2 * 3 * 32 * 64 * 16


def test_what_stands_under_the_layers_scope_is_told_apart():
  def f(x, w):
    for _ in range(2):
      with jax.named_scope(hlo.LAYER):
        x = jnp.tanh(x @ w)
    return (x @ w).sum()

  program = compiled(jax.grad(f, (0, 1)), (64, 32), (32, 32))
  inside = [k for k in program.kernels if k.is_layer]
  each = 2 * 64 * 32 * 32
  assert sum(k.flops for k in inside if k.kind == "products") == 2 * 3 * each
  assert sum(k.flops for k in program.kernels) - sum(k.flops for k in inside) == pytest.approx(2 * each, abs=each)


SLICES = """
%fused (a: f32[8,100], i: s32[], b: f32[100]) -> f32[1,100] {
  %a = f32[8,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %c = s32[] constant(0)
  %b = f32[100]{0} parameter(2)
  %wide = f32[8,100]{1,0} convert(%a)
  %slice = f32[1,100]{1,0} dynamic-slice(%wide, %i, %c), dynamic_slice_sizes={1,100}
  %row = f32[1,100]{1,0} bitcast(%b)
  ROOT %sum = f32[1,100]{1,0} add(%slice, %row)
}

ENTRY %main (p: f32[8,100], i: s32[], q: f32[100]) -> f32[1,100] {
  %p = f32[8,100]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %q = f32[100]{0} parameter(2)
  ROOT %f = f32[1,100]{1,0} fusion(%p, %i.1, %q), kind=kLoop, calls=%fused
}
"""


def test_a_fusion_reads_no_more_than_its_slices():
  assert only(SLICES)[:4] == ("elementwise", 1, 400 + 4 + 400, 400)


IN_PLACE = """
%fused (a: bf16[8,100], u: bf16[1,100], i: s32[]) -> bf16[8,100] {
  %a = bf16[8,100]{1,0} parameter(0)
  %u = bf16[1,100]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %c = s32[] constant(0)
  %n = bf16[1,100]{1,0} negate(%u)
  ROOT %d = bf16[8,100]{1,0} dynamic-update-slice(%a, %n, %i, %c)
}

ENTRY %main (p: bf16[8,100], u: bf16[1,100], i: s32[]) -> bf16[8,100] {
  %p = bf16[8,100]{1,0} parameter(0)
  %u.1 = bf16[1,100]{1,0} parameter(1)
  %i.1 = s32[] parameter(2)
  ROOT %f = bf16[8,100]{1,0} fusion(%p, %u.1, %i.1), kind=kLoop, calls=%fused
}
"""


def test_an_update_in_place_writes_what_it_changes():
  assert only(IN_PLACE)[:4] == ("elementwise", 1, 200 + 4, 200)


ENTRY = "ENTRY %main (p: f32[8,100]) -> f32[8,100] {{\n  %p = f32[8,100]{{1,0}} parameter(0)\n{}\n}}\n"


@pytest.mark.parametrize(
  ("line", "kind"),
  [
    ("copy(%p)", "copies"),
    ('custom-call(%p), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/jit(_row)/kernel/mpmd_map"}',
     "kernel _row"),
    ('custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={\n"a":"b"\n}},'
     ' metadata={op_name="jit(f)/transpose(jvp(jit(gradient)))/pallas_call"}', "kernel gradient"),
    ('custom-call(%p), custom_call_target="some_sort"', "call some_sort"),
    ("all-reduce(%p), to_apply=%add", "all-reduce"),
    ("exponential(%p)", "elementwise"),
  ],
)  # fmt: skip
def test_classes_and_names(line, kind):
  assert only(ENTRY.format(f"  ROOT %x = f32[8,100]{{1,0}} {line}"))[:4] == (kind, 1, 3200, 3200)


def test_what_runs_beside_other_work_counts_once_where_it_is_done():
  lines = """
  %s = (f32[8,100]{1,0}, f32[64,100]{1,0}) all-gather-start(%p), dimensions={0}
  %d = f32[64,100]{1,0} all-gather-done(%s)"""
  assert only(ENTRY.format(lines))[:4] == ("all-gather", 1, 3200, 8 * 3200)


ON_A_TPU = """
  %s = (f32[8,100]{1,0:T(8,128)S(1)}, f32[8,100]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p)
  %d = f32[8,100]{1,0:T(8,128)S(1)} copy-done(%s)
  ROOT %e = f32[8,100]{1,0:T(8,128)} exponential(%d)"""


def test_on_tpus_tiles_are_filled_and_the_chips_own_memory_is_free():
  text = ENTRY.format(ON_A_TPU).replace("{1,0} parameter", "{1,0:T(8,128)} parameter")
  whole = 8 * 128 * 4
  prefetch, exponential = hlo.read(text, is_tpu=True).kernels
  assert prefetch[:4] == ("prefetches", 1, whole, 0)
  assert exponential[:4] == ("elementwise", 1, 0, whole)


LOOP = """
%body (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %t = (s32[], f32[4]{0}) parameter(0)
  %n = s32[] get-tuple-element(%t), index=0
  %x = f32[4]{0} get-tuple-element(%t), index=1
  %y = f32[4]{0} exponential(%x)
  ROOT %r = (s32[], f32[4]{0}) tuple(%n, %y)
}

%condition (t: (s32[], f32[4])) -> pred[] {
  %t.1 = (s32[], f32[4]{0}) parameter(0)
  %n.1 = s32[] get-tuple-element(%t.1), index=0
  %limit = s32[] constant(7)
  ROOT %less = pred[] compare(%n.1, %limit), direction=LT
}

ENTRY %main (x: f32[4], n: s32[]) -> f32[4] {
  %x.1 = f32[4]{0} parameter(0)
  %first = s32[] START
  %pair = (s32[], f32[4]{0}) tuple(%first, %x.1)
  %w = (s32[], f32[4]{0}) while(%pair), condition=%condition, body=%bodyKNOWN
  ROOT %z = f32[4]{0} get-tuple-element(%w), index=1
}
"""


@pytest.mark.parametrize(
  ("start", "known", "turns", "unknown"),
  [
    ("constant(2)", "", 5, 0),
    ("parameter(1)", "", 1, 1),
    ("parameter(1)", ', backend_config={"known_trip_count":{"n":"3"}}', 3, 0),
  ],
)
def test_a_loops_turns_are_found_or_said_to_be_unknown(start, known, turns, unknown):
  program = hlo.read(LOOP.replace("START", start).replace("KNOWN", known))
  (exponential,) = [k for k in program.kernels if k.kind == "elementwise" and k.read == 16]
  assert exponential.times == turns and program.unknown_loops == unknown
  assert ("1 loops of unknown length" in by_class.report(program, H100)) == bool(unknown)


def test_a_branch_counts_as_the_largest():
  text = """
%small (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  ROOT %x = f32[4]{0} copy(%a)
}

%large (b: f32[4]) -> f32[4] {
  %b = f32[4]{0} parameter(0)
  %y = f32[4]{0} exponential(%b)
  ROOT %z = f32[4]{0} exponential(%y)
}

ENTRY %main (i: s32[], c: f32[4]) -> f32[4] {
  %i = s32[] parameter(0)
  %c = f32[4]{0} parameter(1)
  ROOT %r = f32[4]{0} conditional(%i, %c, %c), branch_computations={%small, %large}
}
"""
  assert [k.kind for k in hlo.read(text).kernels] == ["elementwise"] * 2


def kernel(kind: str, times=1, read=0, written=0, flops=0.0, is_layer=True, inputs=()) -> Kernel:
  return Kernel(kind, times, read, written, flops, is_layer, inputs)


def test_times_follow_from_the_rates():
  def ms(k: Kernel) -> float:
    return 1e3 * by_class.total([k], H100).seconds

  assert ms(kernel("elementwise", 10, 2 * 10**9, 10**9)) == pytest.approx(10)
  assert ms(kernel("elementwise", 1000, 8, 8)) == pytest.approx(3)
  assert ms(kernel("products", flops=798e9 * 0.7)) == pytest.approx(1)
  q = (1, 1024, 8, 64)
  attend = by_class.total([kernel("kernel _attend", inputs=(q,))], H100)
  assert attend.flops == 2 * 2 * math.prod(q) * (400 + 96)
  up = by_class.total([kernel("kernel up", inputs=((1000, 512), (512, 2048)))], H100)
  assert up.flops == 2 * 1000 * 512 * 2048
  assert ms(kernel("all-gather", written=8 * 360 * 10**6)) == pytest.approx(7)
  assert by_class.total([kernel("copies", read=5)], dataclasses.replace(H100, kind="cpu")).seconds is None


def test_the_table_adds_up_and_says_what_it_rests_on():
  kernels = (kernel("elementwise", 4, 10**9, 10**9), kernel("reductions", 2, 10**9, 0, is_layer=False))
  lines = by_class.report(hlo.Program((*kernels, kernel("kernel _row", 1, 5, 5)), 0), H100).splitlines()
  cells = {line.split("  ")[1]: line.split() for line in lines[1:6]}
  assert cells["all"][1:6] == ["7", "6.00", "4.00", "0.00", "3.34"]
  assert cells["elementwise and reductions"][-3:] == ["2.0", "4.000", "1.333"]
  assert "kernel _row: by bytes alone" in lines[-1] and "400 keys a query" in lines[-2]


def test_every_kernel_with_known_products_is_there():
  names = {name.removeprefix("kernel ") for name in by_class.FLOPS}
  modules = (attention, attention_on_tpu, chunk_attention, mlp)
  assert all(any(hasattr(kernels, name) for kernels in modules) for name in names)


def test_keys_a_query_follow_from_lengths():
  assert by_class.mean_keys(1) == 1.0
  assert by_class.mean_keys(3) == pytest.approx(2.0, abs=0.01)
  keys = [by_class.mean_keys(n) for n in (1024, 2048, 3072)]
  assert keys == pytest.approx([413, 640, 784], rel=0.03), "of rows made of a published log's lengths"


SETTINGS = Settings(
  model=ModelConfig(
    vocab_size=256, num_layers=2, model_dim=64, num_heads=2, num_kv_heads=1, mlp_mult=2.0, num_loops=0,
    parallel_start_layer=1, rope_dims=16,
  ),
  train=TrainConfig(batch_tokens=512, micro_batches=2, seq_len=64, seq_schedule=(LengthStage(64, 1.0),)),
  ttt=TTTConfig(enabled=False),
)  # fmt: skip


def test_a_compiled_train_step_has_the_layers_products():
  topology = hardware.topology("cpu")
  (step,) = plan.programs(SETTINGS, topology.mesh, every_shape=False)
  assert step.layer_uses == 2 * 2
  program, conditions = plan.examine(step, topology, count_bytes=True).started
  matrices = 3 * 512 * flops.token(SETTINGS.model, looping=False)
  layers = [k for k in program.kernels if k.is_layer and k.kind == "products"]
  work = by_class.total(layers, conditions).flops
  assert matrices < work < 1.5 * matrices, "beside them only attention's scores and the gate"


CONFIG = """
[model]
vocab_size = 256
num_layers = 1
model_dim = 64
num_heads = 1
num_kv_heads = 1
num_loops = 0
parallel_start_layer = 0
[train]
batch_tokens = 512
seq_schedule = "64@1.0"
[ttt]
enabled = false
"""


def test_the_verb_prints_classes_where_something_compiles(tmp_path, capsys, monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # restored afterwards
  monkeypatch.setattr(hardware, "has_cuda", lambda: False)
  config = tmp_path / "small.toml"
  config.write_text(CONFIG)
  assert main(["plan", str(config), "--topology", "cpu", "--bytes"]) == 0
  printed = capsys.readouterr().out
  assert (
    "kernels a use" in printed and "a use: the mean of 8 uses" in printed and " ms" not in printed.split("class")[1]
  )
  assert main(["plan", str(config), "--topology", "h100:1", "--bytes"]) != 0
  assert "--bytes counts what is compiled" in capsys.readouterr().err

"""`pgolf plan` on a small model: lowered for H100s, and compiled for TPUs where libtpu is installed."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pgolf_jax import plan
from pgolf_jax.cli import main
from pgolf_jax.errors import UserError
from pgolf_jax.kernels.hardware import peaks
from pgolf_jax.model import flops
from pgolf_jax.plan import Program, compiled, examine, gpus, hardware, programs, report
from pgolf_jax.settings import LengthStage, LoRAConfig, ModelConfig, Settings, TrainConfig, TTTConfig
from pgolf_jax.settings.load import changed

SETTINGS = Settings(
  model=ModelConfig(
    vocab_size=512, num_layers=3, model_dim=128, num_heads=2, num_kv_heads=1, mlp_mult=2.0, num_loops=1,
    loop_start=1, loop_end=1, parallel_start_layer=2, rope_dims=16,
  ),
  train=TrainConfig(batch_tokens=8 * 512, micro_batches=8, seq_len=256,
                    seq_schedule=(LengthStage(128, 0.5), LengthStage(256, 1.0))),
  ttt=TTTConfig(batch_size=8, seq_len=256, lora=LoRAConfig(rank=8), chunk_size=32),
)  # fmt: skip
CONFIG = """
[model]
vocab_size = 512
num_layers = 2
model_dim = 128
num_heads = 2
num_kv_heads = 1
num_loops = 0
parallel_start_layer = 0
[train]
batch_tokens = 4096
seq_schedule = "256@1.0"
[ttt]
enabled = false
"""


def tpu(name="v5e:2x4"):
  if not hardware.has_libtpu():
    pytest.skip("libtpu is not installed: nothing can be compiled for TPUs")
  return hardware.topology(name)


@pytest.fixture
def no_cuda_plugin(monkeypatch):
  monkeypatch.setattr(hardware, "has_cuda", lambda: False)


def test_every_program_lowers_for_eight_h100s_with_kernels_inside(no_cuda_plugin):
  topology = hardware.topology("h100:8")
  found = [examine(p, topology) for p in programs(SETTINGS, topology.mesh, every_shape=False)]
  step, ttt, phase = found
  assert all(f.kernels > 0 and f.fits and f.is_estimate for f in found)
  assert "256, looping on" in step.title
  # Gradients of the banks travel to their owners in bfloat16, updates come back in float32; stacks are padded to 8.
  banks = 2 * 8 * (128 * 128 + 64 * 128 + 2 * 256 * 128)
  assert step.traffic["reduce-scatter"].count == step.traffic["all-gather"].count == 4
  assert step.traffic["reduce-scatter"].bytes == banks
  assert step.traffic["all-gather"].bytes == 2 * banks
  assert phase.traffic["all-reduce"].bytes > 4 * SETTINGS.model.vocab_size * SETTINGS.model.model_dim
  assert not ttt.traffic, "documents on different devices have nothing to say to one another"


def test_the_step_compiles_for_a_tpu_with_kernels_inside():
  topology = tpu()
  (step,) = programs(dataclasses.replace(SETTINGS, ttt=TTTConfig(enabled=False)), topology.mesh, every_shape=False)
  found = examine(step, topology)
  assert found.kernels > 0 and found.fits
  assert 0 < found.memory["arguments"] < sum(found.memory.values()) < topology.chip.memory
  assert {"products", "memory", "collectives"} == found.floors.keys()
  assert {"all-gather", "all-reduce"} <= found.traffic.keys()


def test_what_stays_on_a_tpu_takes_no_bandwidth():
  """A chain of products whose arrays fit into the chip's own memory: x and w come in, the result goes out."""
  topology = tpu()
  x = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=NamedSharding(topology.mesh, P()))

  def chain(x, w):
    for _ in range(20):
      x = jnp.tanh(x @ w)
    return x

  found = examine(Program("a chain", lambda: jax.jit(chain).trace(x, x), 20 * 2 * 512**3), topology)
  assert found.started is None
  num_bytes = found.floors["memory"] * peaks(topology.kind).bytes_per_s
  assert num_bytes == pytest.approx(3 * 2 * 512 * 512)


def test_the_step_compiles_for_an_h100_that_is_not_there():
  if not hardware.has_cuda():
    pytest.skip("JAX's CUDA plugin is not installed: nothing can be compiled for H100s")
  topology = hardware.topology("h100:8")
  assert topology.only_lowers is None
  (step,) = programs(dataclasses.replace(SETTINGS, ttt=TTTConfig(enabled=False)), topology.mesh, every_shape=False)
  found = examine(step, topology)
  assert found.fits and 0 < found.memory["arguments"] < sum(found.memory.values()) < topology.chip.memory
  assert found.kernels > len(found.machine_code) > 5
  assert {"all-gather", "all-reduce", "reduce-scatter"} <= found.traffic.keys()
  products = [kernel for kernel in found.machine_code if kernel.products]
  assert {kernel.name.split("/")[0] for kernel in products} == {"segment_attention", "leaky_relu2_mlp"}
  assert all(0 < k.registers <= 255 and 0 < k.shared <= compiled.SHARED_MEMORY for k in found.machine_code)
  assert not any(k.spilled for k in found.machine_code if "attention" in k.name)
  again = examine(step, topology)
  assert again.known_kernels == sum(found.machine_code.values()) and not again.machine_code
  assert f"{again.known_kernels} more" in report(again, topology) and " more" not in report(found, topology)


def test_a_plugin_that_refuses_leaves_lowering(monkeypatch):
  def refuse(**_):
    raise RuntimeError("no such plugin")

  monkeypatch.setattr(hardware, "has_cuda", lambda: True)
  monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", refuse)
  assert "no such plugin" in hardware.topology("h100:2").only_lowers


def test_machine_code_is_read_from_what_mosaic_gpu_writes(tmp_path):
  source = tmp_path / "attention" / "kernels.py"
  source.parent.mkdir()
  source.write_text("def first():\n  return 1\n\n\ndef second():\n  return 2\n")
  ptx = f"""
.visible .entry kernel_mosaic_gpu_kernel(
.maxntid 128, 3, 1
  .loc	1 6 0
  wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {{%f1}}
  wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {{%f1}}
  wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {{%f1}}
	.file	1 "{source}"
"""
  assembler = """
ptxas info    : (C7504) Potential Performance Loss: 'setmaxnreg' ignored.
ptxas         .     8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 123 registers, used 16 barriers, 17 bytes smem
info    : used 123 registers, used 16 barriers, 8 stack, 1025 bytes smem, 1088 bytes cmem[0], 0 bytes lmem
"""
  folder = tmp_path / "dump"
  folder.mkdir()
  for name in ("kernel_0", "kernel_1"):
    (folder / f"{name}.ptx").write_text(ptx)
    (folder / f"{name}.ptxas").write_text(assembler)
    sizes = "dynamic_shared_memory_size %7 {\n dynamic_shared_memory_size %c44056_i32 a"
    (folder / f"{name}.mlir-passes.log").write_text(sizes)
  products = (("m64n128k16", 1), ("m64n64k16", 2))
  kernel = compiled.Kernel("attention/second", 123, 12, products, 44_073, 384, ("'setmaxnreg' ignored.",))
  assert compiled.read(folder) == {kernel: 2}
  assert kernel.blocks_on_sm == 1, "48 thousand registers each"
  assert dataclasses.replace(kernel, threads=128).blocks_on_sm == 4
  lines = compiled.table({kernel: 2})
  assert "1 × m64n128k16, 2 × m64n64k16" in lines[1] and lines[-1].endswith("ignored. (attention/second)")


def test_a_record_ignores_the_cache_and_leaves_things_as_they_were(monkeypatch):
  monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", "elsewhere")
  events = []
  jax.monitoring.register_event_listener(lambda event, **_: events.append(event))

  def asks_the_cache(x):
    events.clear()
    jax.jit(lambda y: y + x).lower(1.0).compile()
    return any("compile_requests_use_cache" in event for event in events)

  assert asks_the_cache(1.0)
  with compiled.recorded() as folder:
    assert os.environ["MOSAIC_GPU_DUMP_TO"] == str(folder) and folder.is_dir()
    assert not asks_the_cache(2.0)
  assert os.environ["MOSAIC_GPU_DUMP_TO"] == "elsewhere" and not folder.exists()
  assert asks_the_cache(3.0)


def test_a_program_that_does_not_fit_is_said_not_to():
  topology = tpu()
  everywhere = NamedSharding(topology.mesh, P())
  large = jax.ShapeDtypeStruct((48, 2**27), jnp.float32, sharding=everywhere)  # 24 GiB
  found = examine(Program("too large", lambda: jax.jit(lambda x: x + 1).trace(large), 0.0), topology)
  assert found.fits is False and found.failure


def test_every_shape_of_the_schedule_is_planned_when_asked_for(no_cuda_plugin):
  topology = hardware.topology("h100:8")
  titles = [p.title for p in programs(SETTINGS, topology.mesh, every_shape=True)]
  assert titles[:3] == [
    "train step, segments up to 128, looping off",
    "train step, segments up to 128, looping on",
    "train step, segments up to 256, looping on",
  ]


def test_collectives_are_counted_with_their_bytes():
  mesh = Mesh(np.array(jax.devices()), ("data",))

  def exchange(x):
    gathered = jax.lax.all_gather(x, "data", tiled=True)
    scattered = jax.lax.psum_scatter(gathered, "data", tiled=True)
    return gathered.sum() + jax.lax.psum(scattered * x, "data")

  f = jax.jit(jax.shard_map(exchange, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False))
  lowered = f.lower(jax.ShapeDtypeStruct((64, 16), jnp.float32))
  whole, part = 64 * 16 * 4, 8 * 16 * 4
  expected = {"all-gather": (1, whole), "reduce-scatter": (1, whole), "all-reduce": (1, part)}
  assert compiled.in_stablehlo(lowered.compiler_ir("stablehlo"), 8) == expected
  assert compiled.in_hlo(lowered.compile().as_text(), 8) == expected


def test_collectives_that_run_beside_other_work_count_once():
  text = """
  %ag = (f32[2,16]{1,0}, f32[16,16]{1,0}) all-gather-start(%x), dimensions={0}
  %done = f32[16,16]{1,0} all-gather-done(%ag)
  %ar = (bf16[8]{0}, f32[4]{0}) all-reduce(%a, %b), to_apply=%add
  %ar-start = ((f32[32]{0}), f32[32]{0}) all-reduce-start(%c), to_apply=%add
  %ar-done = f32[32]{0} all-reduce-done(%ar-start)
  %rs = ((bf16[8,64]{1,0}, bf16[8]{0}), (bf16[1,64]{1,0}, bf16[1]{0})) reduce-scatter-start(%e, %f), to_apply=%add
  %rs-done = (bf16[1,64]{1,0}, bf16[1]{0}) reduce-scatter-done(%rs)
  """
  assert compiled.in_hlo(text, 8) == {
    "all-gather": (1, 16 * 16 * 4),
    "all-reduce": (2, 2 * 8 + 4 * 4 + 32 * 4),
    "reduce-scatter": (1, 8 * 65 * 2),
  }


def test_a_chain_of_fusions_with_one_exchange_counts_once():
  gather = '  %{} = f32[8,64]{{1,0}} all-gather(%p), channel_id=1, frontend_attributes={{chain_id="{}"}}\n'
  text = "".join(gather.format(f"all-gather.{i}", i // 3) for i in range(6))
  assert compiled.in_hlo(text + "  %all-gather = f32[8,2]{1,0} all-gather(%p), channel_id=1\n", 8) == {
    "all-gather": (3, 2 * 8 * 64 * 4 + 8 * 2 * 4)
  }


def test_an_all_reduce_sends_twice_what_a_gather_does():
  assert compiled.Traffic(1, 800).sent("all-reduce", 8) == 2 * compiled.Traffic(1, 800).sent("all-gather", 8)
  assert compiled.Traffic(1, 800).sent("all-gather", 8) == 700


def test_the_formula_counts_what_xla_counts():
  """Of a forward pass without attention's scores, which XLA counts by blocks, and with element-wise work beside."""
  m = SETTINGS.model
  small = flops.forward(m, 1, 0, looping=True)
  by_hand = 2 * (4 * (2 * 128 * 128 + 2 * 128 * 64 + 2 * 128 * 256 + 128) + 512 * 128)
  assert small == by_hand
  x = jax.ShapeDtypeStruct((256, 128), jnp.float32)
  w = jax.ShapeDtypeStruct((512, 128), jnp.float32)
  counted = jax.jit(lambda x, w: x @ w.T).lower(x, w).compile().cost_analysis()["flops"]
  assert counted == pytest.approx(2 * 256 * 512 * 128, rel=0.01)


def test_steps_beyond_the_last_coefficients_are_not_counted():
  counted = [flops.orthogonalisation(changed(SETTINGS, {"optimizer.muon_steps": n}), 8) for n in (4, 5, 10)]
  assert counted[1] == 1.25 * counted[0] == counted[2]


@pytest.mark.parametrize(("name", "near"), [("v5e-2x4", "v5e:2x4"), ("rtx-4090", "rtx4090"), ("h100:x", "h100:8")])
def test_unknown_topologies_are_refused_with_one_that_exists(name, near):
  with pytest.raises(UserError, match=f"did you mean {near}"):
    hardware.topology(name)


@pytest.mark.parametrize("name", gpus.GPUS)
def test_every_listed_gpu_has_its_peaks_its_limits_and_a_description(name, no_cuda_plugin):
  gpu, topology = gpus.GPUS[name], hardware.topology(name)
  assert topology.kind == gpu.kind and topology.mesh.size == 1 and topology.chip.memory == gpu.memory
  text = gpus.target_config(gpu, peaks(gpu.kind).bytes_per_s)
  assert f"core_count: {gpu.cores}\n" in text and f"major: {gpu.capability[0]} minor: {gpu.capability[1]}" in text
  assert hardware.has_bfloat16(topology) == (gpu.capability >= (8, 0))


def test_an_estimate_is_said_to_be_one_and_memory_decides(no_cuda_plugin):
  topology = hardware.topology("t4")
  (step,) = programs(dataclasses.replace(SETTINGS, ttt=TTTConfig(enabled=False)), topology.mesh, every_shape=False)
  found = examine(step, topology)
  text = report(found, topology)
  assert found.fits and "of 14.9 GiB a device, fits" in text and "estimated from the trace" in text
  size = topology.chip.memory
  for estimated, fits, words in ((size // 2, True, "fits"), (size, None, "may not fit"), (2 * size, False, "DOES NOT")):
    assert plan._may_fit(estimated, topology) is fits
    changed = dataclasses.replace(found, memory={"temporaries": estimated}, fits=fits)
    assert f"a device, {words}" in report(changed, topology)
  assert "set XLA_CLIENT_MEM_FRACTION=0.95" in report(
    dataclasses.replace(found, memory={"temporaries": int(0.8 * size)}, fits=True), topology
  )


def test_the_verb_prints_a_table(no_cuda_plugin, tmp_path, capsys, monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # restored afterwards
  config = tmp_path / "small.toml"
  config.write_text(CONFIG)
  assert main(["plan", str(config), "--topology", "h100:1"]) == 0
  printed = capsys.readouterr().out
  assert "1 × NVIDIA H100" in printed and "lowered for CUDA only" in printed
  assert "train step, segments up to 256, looping off" in printed and "estimated from the trace" in printed


def test_the_verb_says_what_a_card_without_bfloat16_does(no_cuda_plugin, tmp_path, capsys, monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # restored afterwards
  config = tmp_path / "small.toml"
  config.write_text(CONFIG)
  assert main(["plan", str(config), "--topology", "t4"]) == 0
  assert "Tesla T4 has no units for bfloat16" in capsys.readouterr().out

"""Items of plans B and C of `pgolf bench gpu-day`: the training step, its parts, and steps of test-time training."""

import collections
import dataclasses
import functools
import importlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pgolf_jax.bench import ttt
from pgolf_jax.bench.gpu_day import Day, Row
from pgolf_jax.bench.gpu_day_kernels import pytorch, timed
from pgolf_jax.bench.harness import Way, Work
from pgolf_jax.bench.kernels import document_lengths
from pgolf_jax.bench.step import Case, first_params
from pgolf_jax.kernels.hardware import target
from pgolf_jax.model import adapters
from pgolf_jax.model.flops import positions
from pgolf_jax.runtime.distributed import data_mesh
from pgolf_jax.scoring.buckets import LEARN, Shape
from pgolf_jax.settings import LengthStage, ModelConfig, Settings, TrainConfig, TTTConfig
from pgolf_jax.settings.load import changed

_TOKENS = 98_304
"""Of a micro-batch of the record."""
_PEAK_NAMES = 30
"""Kernels that the summary of a trace lists."""


def settings(day: Day, *, layers: int | None = None) -> Settings:
  """Returns the record's settings with one micro-batch a step, or a tiny model's for a dry run.

  Args:
    layers: of the model, none of them looped; all if not given.
  """
  if day.tiny:
    model = ModelConfig(
      vocab_size=128, num_layers=2, model_dim=64, num_heads=2, num_kv_heads=1, mlp_mult=2.0, num_loops=1, loop_start=1,
      loop_end=1, parallel_start_layer=1, xsa_last_n=2, rope_dims=8,
    )  # fmt: skip
  else:
    model = ModelConfig()
  if layers is not None:
    model = dataclasses.replace(model, num_layers=layers, num_loops=0, parallel_start_layer=0)
  tokens = 256 if day.tiny else _TOKENS
  dtype = "float32" if target().platform == "cpu" else "bfloat16"
  train = TrainConfig(batch_tokens=tokens, micro_batches=1, world_size=1, compute_dtype=dtype,
                      seq_schedule=(LengthStage(tokens, 1.0),))  # fmt: skip
  whole = Settings(model=model, train=train, ttt=TTTConfig(enabled=False))
  return changed(whole, {"optimizer.muon_dtype": dtype})


def case(day: Day, seq_len: int, looping: bool, *, layers: int | None = None, passes: str = "gradient") -> Case:
  """Returns one micro-batch of documents of real lengths: loss and gradient, or the whole step."""
  s = settings(day, layers=layers)
  documents = tuple(int(n) for n in document_lengths(s.train.batch_tokens + 1))
  length = min(seq_len, 64) if day.tiny else seq_len
  return Case(s, data_mesh(jax.devices()[:1]), first_params(s), passes, length, looping, documents)


def _stand_in() -> type:
  return importlib.import_module("pgolf_jax.bench.torch_stand_in").StandIn


def _way(one: Case, by: str) -> Way | None:
  """Returns what "kernels", "xla" or "PyTorch" stands for; None for PyTorch where it does not compute."""
  if by != "PyTorch":
    return one.jax_way(by)
  module = pytorch()
  return module and module.way(one, compiled=target().is_gpu, kind=_stand_in())


def step(day: Day, seq_len: int, looping: bool, by: str) -> Iterator[Row]:
  """One micro-batch of documents of real lengths, loss and gradient."""
  one = case(day, seq_len, looping)
  if way := _way(one, by):
    yield from timed(way, day, f"{seq_len} {'on' if looping else 'off'}", by=by, tokens=one.work.amount)


def two_layers(day: Day) -> Iterator[Row]:
  """Loss and gradient of a model of two layers, which is small enough to be looked at in a trace."""
  for by in ("kernels", "xla", "PyTorch"):
    if way := _way(case(day, 2048, False, layers=2), by):
      yield from timed(way, day, f"two layers, {by}", by=by)


def optimizer(day: Day) -> Iterator[Row]:
  """The optimizer's update alone: clipping aside, Muon, AdamW and the moving average of all parameters."""
  one = case(day, 2048, False, passes="step")
  yield from timed(Way({"by": "JAX"}, one.update), day, "Muon, AdamW, average: JAX", by="JAX")
  if (module := pytorch()) is not None:
    way = Way(
      {"by": "PyTorch"}, lambda: _torch_update(module, one), wait=lambda _: module.synchronize(target().platform)
    )
    yield from timed(way, day, "Muon, AdamW, average: PyTorch", by="PyTorch")


def _torch_update(module, one: Case) -> Callable[[], None]:
  """Returns a function that does in PyTorch what follows the gradients of a step, from random ones."""
  torch, platform = module.torch, target().platform
  model = module.TorchGPT(one.settings.model, one.params, device=module.device(platform))
  whole = module.TorchStep(one.settings, model, 1, model.loss)
  if target().is_gpu:
    whole.orthogonalise = torch.compile(whole.orthogonalise)
  grads = {name: 0.01 * torch.randn_like(model.params[name]) for name in whole.trained}

  def run():
    for name, grad in grads.items():
      model.params[name].grad = grad
    with torch.no_grad():
      whole.update(one.lr_scale, one.momentum)

  return run


def trace(day: Day) -> Iterator[Row]:
  """Two steps in the profiler: kernels by time, sums by class, and the share of time in which the device is idle."""
  one = case(day, 2048, True, passes="step")
  run = one.start("kernels")
  jax.block_until_ready([run() for _ in range(2)])
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(2):
        jax.block_until_ready(run())
    profile = read_trace(next(Path(folder).rglob("*.xplane.pb")))
  total = sum(profile.ns.values())
  if not total:
    yield {"config": "trace", "verdict": "failed", "note": "the profiler saw nothing run on the device"}
    return
  lines = [f"{ns / 2e6:10.3f} ms  {100 * ns / total:5.1f} %  {profile.calls[name] // 2:5d} ×  {name}"
           for name, ns in profile.ns.most_common()]  # fmt: skip
  (day.out / "trace.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
  by_class = profile.by_class()
  idle = 1 - profile.busy_ns / profile.span_ns
  elementwise = by_class.get("elementwise", 0) / total
  note = f"idle {idle:.1%}, {sum(profile.calls.values()) // 2} kernels"
  shares = {"idle": idle, "idle_limit": 0.05, "elementwise": elementwise}
  yield {"config": "a step, all kernels", "ms": total / 2e6, **shares, "note": note}
  for name, ns in by_class.most_common():
    yield {"config": f"class {name}", "ms": ns / 2e6, "note": f"{ns / total:.1%}"}
  for name, ns in profile.ns.most_common(_PEAK_NAMES):
    yield {"config": name[:70], "ms": ns / 2e6, "note": f"{profile.calls[name] // 2} × a step"}


class Profile(NamedTuple):
  """What ran on the device.

  Attributes:
    ns, calls: time and number of calls of each kernel.
    span_ns: from the first kernel's beginning to the last one's end.
    busy_ns: of that, time in which at least one kernel ran.
  """

  ns: collections.Counter
  calls: collections.Counter
  span_ns: float
  busy_ns: float

  def by_class(self) -> collections.Counter:
    """Time by class of kernel."""
    sums = collections.Counter()
    for name, ns in self.ns.items():
      sums[next(label for label, pattern in _CLASSES.items() if re.search(pattern, name, re.IGNORECASE))] += ns
    return sums


_CLASSES = {
  "attention": r"attend|attention|query_gradient|key_gradient|flash",
  "MLP": r"mlp|up_gradient|fused_product|\bup\b",
  "cross-entropy": r"log_sum_exp|xent",
  "rows": r"\brow|norm|rotary",
  "products": r"gemm|cublas|cutlass|\bdot|nvjet|wgmma|sm90_x|convolution|custom-call",
  "exchange": r"nccl|all-?reduce|all-?gather|reduce-?scatter|permute",
  "copies": r"memcpy|memset|\bcopy",
  "elementwise": r"",
}
"""Class of kernel → pattern of names; the first that matches counts, and what no other class has is elementwise."""


def read_trace(path: Path) -> Profile:
  """Reads the kernels of a trace's device planes, or on a CPU those of XLA's threads."""
  data = jax.profiler.ProfileData.from_file(str(path))
  planes = [plane for plane in data.planes if plane.name.startswith("/device:")]
  names = ("Stream", "XLA Ops")
  if not planes:
    planes, names = list(data.planes), ("tf_XLA",)
  ns, calls, spans = collections.Counter(), collections.Counter(), []
  for plane in planes:
    for line in plane.lines:
      if not line.name.startswith(names):
        continue
      for event in line.events:
        ns[event.name] += event.duration_ns
        calls[event.name] += 1
        spans.append((event.start_ns, event.start_ns + event.duration_ns))
  return Profile(ns, calls, *_covered(sorted(spans)))


def _covered(spans: Sequence[tuple[float, float]]) -> tuple[float, float]:
  """Returns the time from the first beginning to the last end, and the part of it that the spans cover."""
  if not spans:
    return 0.0, 0.0
  busy, reached = 0.0, spans[0][0]
  for begin, end in spans:
    busy += max(0.0, end - max(begin, reached))
    reached = max(reached, end)
  return reached - spans[0][0], busy


_OPTIONS: dict[str, Mapping[str, Any]] = {
  "as it is": {},  # as a run has it: what `jax_setup.GPU_FLAGS` turns on is on
  "no Triton products": {"xla_gpu_enable_triton_gemm": False},
  "all tilings": {"xla_gpu_exhaustive_tiling_search": True},
  "no latency hiding": {"xla_gpu_enable_latency_hiding_scheduler": False},
  "no command buffers": {"xla_gpu_enable_command_buffer": ""},
  "command buffers from 1": {"xla_gpu_graph_min_graph_size": 1},
  "command buffers from 20": {"xla_gpu_graph_min_graph_size": 20},
}
"""XLA's options that may be worth a percent on a GPU; one that its version does not know is reported as failed."""


def options(day: Day) -> Iterator[Row]:
  """XLA's options on two layers, and the best of them on the whole model where it gains more than its noise."""
  choices = _OPTIONS if target().is_gpu else {"as it is": {}, "as it is, again": {}}
  small = case(day, 2048, False, layers=2)
  rows = []
  for name, given in choices.items():
    for row in timed(small.jax_way("kernels", given), day, f"two layers, {name}", options=dict(given)):
      rows.append(row)
      yield row
  usable = [row for row in rows if row.get("ms")]
  if not usable or rows[0] is not usable[0]:
    return
  first, best = usable[0], min(usable, key=lambda row: row["ms"])
  gain = first["ms"] - best["ms"]
  if gain < 0.01 * first["ms"] or gain < best["p90"] - best["p10"]:
    yield {"config": "verdict", "note": "no option gains 1 % and more than its noise: those of a run stay"}
    return
  whole = case(day, 2048, True)
  for given in ({}, best["options"]):
    name = best["config"].removeprefix("two layers, ") if given else "as it is"
    yield from timed(whole.jax_way("kernels", given), day, f"2048 on, {name}", options=dict(given))


def learning_step(day: Day, method: str, shape: Sequence[int]) -> Iterator[Row]:
  """A chunk of every document scored and learnt from, at (documents, window, targets), by JAX and by PyTorch."""
  slots, window, width = (2, 32, 8) if day.tiny else shape
  s = changed(settings(day), {"ttt.method": method, "ttt.seq_len": 64 if day.tiny else 3072, "ttt.chunk_size": width})
  more = {"method": method, "slots": slots, "window": window, "width": width, "steps": ttt.LEARNING_STEPS}
  work = Work(slots, "documents")
  prepare = functools.partial(ttt.learning_steps, s, data_mesh(jax.devices()[:1]), Shape(slots, window, width, LEARN))
  yield from timed(Way({"by": "JAX"}, prepare, work), day, f"{ttt.LEARNING_STEPS} steps, JAX", by="JAX", **more)
  if method == "exact" and (module := pytorch()) is not None:
    prepare = lambda: _torch_learning(module, s, (slots, window, width))  # noqa: E731
    way = Way({"by": "PyTorch"}, prepare, work, wait=lambda _: module.synchronize(target().platform))
    yield from timed(way, day, f"{ttt.LEARNING_STEPS} steps, PyTorch", by="PyTorch", **more)


def _torch_learning(module, s: Settings, shape: tuple[int, int, int]) -> Callable[[], None]:
  """Returns a function that learns from as many chunks in PyTorch, as the reference does: each from a window afresh.

  Rows are windows that stand end to end; adapters are one matrix a row, and Adam moves them and nothing else.
  """
  torch, platform = module.torch, target().platform
  (slots, window, width), m, lora = shape, s.model, s.ttt.lora
  place = module.device(platform)

  def adapter(outputs: int) -> list:
    A = (torch.rand(slots, lora.rank, m.model_dim, device=place) * 2 - 1) * m.model_dim**-0.5
    return [x.requires_grad_() for x in (A, torch.zeros(slots, outputs, lora.rank, device=place))]

  places = positions(m, looping=True)
  moved = {
    kind: [adapter(outputs) for _ in range(1 if kind == "head" else places)]
    for kind, outputs in adapters.widths(m, s.ttt).items()
  }

  class Adapted(_stand_in()):
    """The stand-in with adapters; `used` counts how often each kind was used in this pass, which is its position."""

    def _adapted(self, kind, y, n):
      if kind not in moved:
        return y
      A, B = moved[kind][self.used[kind]]
      self.used[kind] += 1
      low = n.unflatten(0, (slots, -1)) @ A.to(n.dtype).mT
      return y + lora.alpha / lora.rank * (low @ B.to(n.dtype).mT).flatten(0, 1)

    def _head(self, hidden, p):
      last = hidden.unflatten(0, (slots, window))[:, -width:].flatten(0, 1)
      return self._adapted("head", super()._head(last, p), last)

    def _loss(self, tokens_T1, segments, looping):
      self.used = dict.fromkeys(moved, 0)
      z, target_BxX = (
        self._z(tokens_T1[:-1], segments, looping),
        tokens_T1[1:].unflatten(0, (slots, window))[:, -width:],
      )
      return self.operations.softcapped_xent(z, target_BxX.flatten(), m.logit_softcap).sum() / width

  model = Adapted(m, first_params(s), getattr(torch, s.train.compute_dtype), place)
  for value in model.params.values():
    value.requires_grad_(False)
  if target().is_gpu:
    model.compile()
  every = [x for pairs in moved.values() for pair in pairs for x in pair]
  adam = torch.optim.AdamW(every, lr=lora.lr * lora.lr_mult, betas=(lora.beta1, lora.beta2), eps=1e-10,
                           weight_decay=lora.weight_decay)  # fmt: skip
  tokens = torch.randint(2, m.vocab_size, (slots * window + 1,), device=place)

  def run():
    for _ in range(ttt.LEARNING_STEPS):
      adam.zero_grad()
      model.loss(tokens, (window,) * slots, True).backward()
      adam.step()

  return run

"""One pass of the model at one shape, and the ways to do it: as a run does it, by plain XLA, by PyTorch."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pgolf_jax import kernels
from pgolf_jax.bench import harness
from pgolf_jax.bench.harness import Way, Work
from pgolf_jax.kernels.hardware import peaks
from pgolf_jax.model import flops
from pgolf_jax.model.gpt import bind
from pgolf_jax.model.loss import packed_nll
from pgolf_jax.plan.examine import memory
from pgolf_jax.runtime.mesh import world_size
from pgolf_jax.settings.config import Settings
from pgolf_jax.training.step import StepInputs, TrainState, TrainStep

Pass = Literal["forward", "gradient", "step"]

LR_SCALE, MOMENTUM = 1e-3, 0.95
"""Of the timed steps, which all see the same tokens: small, so that the weights stay where they are."""
TRACED_STEPS = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
  """One pass at one shape.

  Tokens are random, and every document fills a segment.

  Attributes:
    params: weights to begin with, by the recipe's names.
    passes: the whole step on the mesh, or one micro-batch on its first device.
  """

  settings: Settings
  mesh: Mesh
  params: dict[str, np.ndarray]
  passes: Pass
  seq_len: int
  looping: bool

  @property
  def device(self) -> jax.Device:
    return self.mesh.devices.flat[0]

  @functools.cached_property
  def tokens_MxT1(self) -> np.ndarray:
    """One micro-batch, or all of a step."""
    t, m = self.settings.train, self.settings.model
    shape = (t.micro_batches if self.passes == "step" else 1, t.batch_tokens // t.micro_batches + 1)
    tokens = np.random.default_rng(0).integers(0, m.vocab_size - 1, shape, np.uint16)
    tokens += tokens >= m.bos_id
    tokens[:, :: self.seq_len] = m.bos_id
    return tokens

  @functools.cached_property
  def work(self) -> Work:
    """Tokens of all devices; operations and bytes of one."""
    targets = self.tokens_MxT1[:, 1:].size
    devices = self.mesh.size if self.passes == "step" else 1
    forward = flops.forward(self.settings.model, targets // devices, self.seq_len, looping=self.looping)
    products = model_flops = forward if self.passes == "forward" else 3 * forward
    if self.passes == "step":
      products = flops.train_step(self.settings, devices, self.seq_len, looping=self.looping)
    # A step reads and writes parameters, their average, and Adam's two moments or Muon's one.
    times = {"forward": 1, "gradient": 2, "step": 6}[self.passes]
    num_bytes = times * sum(x.nbytes for x in self.params.values())
    return Work(targets, "tokens", products, num_bytes, model_flops, peaks(self.device.device_kind))

  def _labels(self, by: str) -> dict[str, str]:
    looping = "on" if self.looping else "off"
    return {"pass": self.passes, "segments": str(self.seq_len), "looping": looping, "by": by}

  def jax_way(self, backend: str) -> Way:
    """A compiled program: plain XLA for "xla", for "kernels" what a run takes. Its facts are its planned bytes."""
    return Way(
      self._labels(backend),
      functools.partial(self.start, backend),
      self.work,
      count_memory=functools.partial(harness.device_memory, self.device),
      inspect=lambda _: sum(memory(self.compiled(backend)).values()),
    )

  @functools.lru_cache(maxsize=2)  # noqa: B019
  def compiled(self, backend: str) -> jax.stages.Compiled:
    """The program."""
    settings, shape = self.settings, {"seq_len": self.seq_len, "looping": self.looping}
    with kernels.prefer(*["xla"] * (backend == "xla")):
      if self.passes == "step":
        return TrainStep(settings, self.mesh).lower(**shape).compile()
      dtype = jnp.dtype(settings.train.compute_dtype)
      loss = lambda p, rows: packed_nll(bind(settings.model, p), rows, dtype=dtype, **shape).mean()  # noqa: E731
      f = jax.jit(loss if self.passes == "forward" else jax.value_and_grad(loss))
      return f.lower(*self._micro_batch()).compile()

  def _micro_batch(self):
    return jax.device_put((self.params, self.tokens_MxT1.astype(np.int32)), self.device)

  def first_step(self) -> tuple[TrainState, StepInputs]:
    """The arguments of the first step, on the devices."""
    step = TrainStep(self.settings, self.mesh)
    return step.init(self.params), step.inputs(self.tokens_MxT1, LR_SCALE, MOMENTUM)

  def start(self, backend: str) -> Callable[[], Any]:
    """Places the arguments; returns a function that runs the program once, from the state the last run left."""
    program = self.compiled(backend)
    if self.passes != "step":
      return functools.partial(program, *self._micro_batch())
    state, inputs = self.first_step()

    def run():
      nonlocal state
      state, metrics = program(state, inputs)
      return metrics

    return run

  def trace(self, folder: Path, backend: str) -> str:
    """Writes a trace of some steps; returns a note that says where."""
    run = self.start(backend)
    jax.block_until_ready(run())
    with jax.profiler.trace(folder):
      for i in range(TRACED_STEPS):
        with jax.profiler.StepTraceAnnotation("train", step_num=i):
          jax.block_until_ready(run())
    shape = f"{self.seq_len}, looping {'on' if self.looping else 'off'}"
    return f"{folder}: a trace of {TRACED_STEPS} steps at {shape} (xprof --logdir {folder})"

  def torch_way(self, pytorch: ModuleType, *, compiled: bool) -> Way:
    """The same in PyTorch, on the same kind of device."""
    platform = self.device.platform
    return Way(
      self._labels("PyTorch"),
      functools.partial(self.start_torch, pytorch, compiled=compiled),
      self.work,
      wait=lambda _: pytorch.synchronize(platform),
      count_memory=functools.partial(pytorch.count_memory, platform),
    )

  def start_torch(self, pytorch: ModuleType, *, compiled: bool) -> Callable[[], Any]:
    """As `start`."""
    settings, torch, platform = self.settings, pytorch.torch, self.device.platform
    dtype = getattr(torch, settings.train.compute_dtype)
    model = pytorch.TorchGPT(settings.model, self.params, dtype, pytorch.device(platform))
    tokens_MxT1 = pytorch.tensor(self.tokens_MxT1, platform)
    starts = np.append(np.arange(0, tokens_MxT1.shape[1] - 1, self.seq_len), tokens_MxT1.shape[1] - 1)
    lengths = tuple(np.diff(starts).tolist())
    loss = torch.compile(model.loss) if compiled else model.loss
    loss = functools.partial(loss, lengths=lengths, looping=self.looping)
    if self.passes == "step":
      ranks = world_size(settings, self.mesh) if settings.optimizer.clip_scope == "rank" else 1
      step = pytorch.TorchStep(settings, model, ranks, loss)
      return functools.partial(step, tokens_MxT1, LR_SCALE, MOMENTUM)

    def forward():
      with torch.no_grad():
        return loss(tokens_MxT1[0])

    def gradient():
      total = loss(tokens_MxT1[0])
      return torch.autograd.grad(total, list(model.params.values()), allow_unused=True)

    return forward if self.passes == "forward" else gradient

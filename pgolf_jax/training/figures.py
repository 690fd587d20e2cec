"""What is written down of a step: its line in metrics.jsonl, and the same figures as curves."""

from jax.sharding import Mesh

from pgolf_jax.kernels.hardware import peaks
from pgolf_jax.model import flops
from pgolf_jax.runtime import memory
from pgolf_jax.settings import Settings
from pgolf_jax.training import StepPlan


def learning_rates(settings: Settings, lr_scale: float) -> dict[str, float]:
  """Returns the learning rate of each group of parameters under the schedule's factor."""
  optimizer = settings.optimizer
  return {name: getattr(optimizer, name) * lr_scale for name in ("matrix_lr", "embed_lr", "scalar_lr")}


def mfu(settings: Settings, mesh: Mesh, plan: StepPlan, seconds: float) -> float | None:
  """Returns the model FLOPs utilisation of a step: three forward passes' operations over the devices' peak.

  It is None where the peak rate of the device is not known, as on CPUs. Source of the definition: Chowdhery et al.
  2022, "PaLM", appendix B; operations as in model/flops.py, attention within segments, Muon's left out.

  Args:
    seconds: that the step took.
  """
  limits = peaks(mesh.devices.flat[0].device_kind)
  if limits is None or seconds <= 0:
    return None
  t = settings.train
  operations = flops.forward_and_gradient(settings.model, t.batch_tokens, plan.seq_len, looping=plan.looping)
  return operations / seconds / (limits.flops_per_s * mesh.size)


def peak_memory(mesh: Mesh) -> int:
  """Returns the most bytes in use so far on this process's first device; where it does not say, in the process."""
  stats = mesh.local_devices[0].memory_stats() or {}
  if "peak_bytes_in_use" in stats:
    return stats["peak_bytes_in_use"]
  return memory.peak_bytes()


def speed(settings: Settings, mesh: Mesh, plan: StepPlan, seconds: float) -> dict[str, float]:
  """Returns what a step of `seconds` says of the machine: tokens/s, MFU where the device's peak is known, memory."""
  figures = {"tokens_per_second": settings.train.batch_tokens / max(seconds, 1e-9)}
  if (share := mfu(settings, mesh, plan, seconds)) is not None:
    figures["mfu"] = share
  return figures | {"peak_memory_bytes": peak_memory(mesh)}


def curves(line: dict) -> dict[str, float]:
  """Returns the figures of a line of metrics.jsonl under the names of their curves, grouped by what stands before /."""
  names = {"val_loss": "loss/validation", "val_bpb": "bpb/validation", "peak_memory_bytes": "peak_memory_gib"}
  names |= {f"{group}_lr": f"lr/{group}" for group in ("matrix", "embed", "scalar")}
  figures = {names.get(name, name): value for name, value in line.items() if name != "step"}
  if "peak_memory_gib" in figures:
    figures["peak_memory_gib"] /= 2**30
  return figures

"""What a script computes for each kind of case."""

import contextlib
import dataclasses
import math
import tempfile
import types
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pgolf_jax.data.shards import ValidationData
from pgolf_jax.errors import UserError
from pgolf_jax.parity import Arrays
from pgolf_jax.parity.dump import texts
from pgolf_jax.parity.dump.script import Script, as_arrays


class Dumped(NamedTuple):
  """A case: its two files of tensors, and what its case.json says besides."""

  inputs: Arrays
  expected: Arrays
  about: dict[str, Any]


@dataclasses.dataclass
class Job:
  """What to dump.

  Attributes:
    model: in float32, with the weights that the case starts from.
    folder: of the case; shards go into it.
    tokens: of the row or the stream.
    max_doc_len: longest segment of a `forward` case, tokens.
  """

  script: Script
  model: torch.nn.Module
  folder: Path
  tokens: int
  documents: int
  max_doc_len: int
  steps: int
  data: Path | None
  rng: np.random.Generator

  @property
  def h(self) -> Any:
    return self.script.hyperparameters

  @property
  def module(self) -> types.ModuleType:
    return self.script.module

  @property
  def device(self) -> str:
    return self.script.places.device

  def stream(self, tokens: int) -> ValidationData:
    return texts.stream(self.rng, tokens, self.documents, self.h.vocab_size, self.data)

  def row(self) -> np.ndarray:
    """Tokens [T + 1] of a packed row."""
    return self.stream(self.tokens + 1).tokens

  def params(self) -> Arrays:
    return as_arrays(dict(self.model.named_parameters()), "params/")

  def segments(self, tokens_T: torch.Tensor) -> dict[str, Any]:
    """The arguments with which the script's model keeps the segments of a row apart."""
    T = len(tokens_T)
    starts = (tokens_T == 1).nonzero().flatten().tolist()
    if hasattr(self.module, "_build_cu_seqlens"):
      boundaries, longest = self.module._build_cu_seqlens(starts, T, tokens_T.device, self.max_doc_len, 64)
      return {"cu_seqlens": boundaries, "max_seqlen": longest}
    self.script.places.used["_build_cu_seqlens"] = "segments from each bos, cut at the longest length"
    starts = sorted({0, *starts})
    cut = [at for a, b in zip(starts, [*starts[1:], T], strict=True) for at in range(a, b, self.max_doc_len)] + [T]
    boundaries = torch.tensor(cut, dtype=torch.int32, device=tokens_T.device)
    return {"cu_seqlens": boundaries, "max_seqlen": int(boundaries.diff().max())}


def forward(job: Job) -> Dumped:
  """Loss, gradients and evaluation logits of one packed row, without and with the loop."""
  tokens = job.row()
  inputs = {"tokens": tokens, **job.params()}
  row = torch.tensor(tokens, dtype=torch.int64, device=job.device)
  x, y, segments = row[None, :-1], row[None, 1:], job.segments(row[:-1])
  expected: Arrays = {}
  for looping in (False, True):
    prefix = f"loop{int(looping)}/"
    _set_looping(job, looping)
    job.model.train()
    job.model.zero_grad(set_to_none=True)
    loss = job.model(x, y, **segments)
    loss.backward()
    grads = {name: p.grad for name, p in job.model.named_parameters() if p.grad is not None}
    job.model.eval()
    with torch.no_grad():
      logits = job.model.forward_logits(x, **segments)[0]
    expected |= as_arrays({"loss": loss.reshape(1), "logits": logits}, prefix) | as_arrays(grads, f"{prefix}grads/")
  return Dumped(inputs, expected, {"max_doc_len": job.max_doc_len})


def optimizer(job: Job) -> Dumped:
  """Steps of the script's optimizers on gradients of packed rows, at falling rates and rising momentum."""
  model, h = job.model, job.h
  inputs, expected, plan = job.params(), {}, []
  optimizers = job.module.Optimizers(h, model)
  _set_looping(job, True)
  model.train()
  first, last = (getattr(h, name, 0.95) for name in ("muon_momentum_warmup_start", "muon_momentum"))
  trained = [p for p in model.parameters() if p.requires_grad]
  for k in range(job.steps):
    row = torch.tensor(job.row(), dtype=torch.int64, device=job.device)
    model.zero_grad(set_to_none=True)
    model(row[None, :-1], row[None, 1:], **job.segments(row[:-1])).backward()
    inputs |= as_arrays({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, f"grads/{k}/")
    plan.append({"lr_scale": 0.7**k, "muon_momentum": first + (last - first) * k / max(job.steps - 1, 1)})
    for group in (group for one in optimizers for group in one.param_groups):
      group["lr"] = group["base_lr"] * plan[k]["lr_scale"]
    for group in optimizers.optimizer_muon.param_groups:
      group["momentum"] = plan[k]["muon_momentum"]
    limit = h.grad_clip_norm if h.grad_clip_norm > 0 else math.inf
    norm = torch.nn.utils.clip_grad_norm_(trained, limit)
    optimizers.step()
    expected |= as_arrays({"grad_norm": norm.reshape(1)}, "")
    expected[f"grad_norm/{k}"] = expected.pop("grad_norm")
    expected |= as_arrays(dict(model.named_parameters()), f"params/{k}/")
  return Dumped(inputs, expected, {"steps": plan, "muon_dtype": "float32"})


def train(job: Job) -> Dumped:
  """The script's own training loop by steps, from its text in `data/`, and plain scores before and after averaging."""
  h, module = job.h, job.module
  micro_batches = h.grad_accum_steps
  row = h.train_batch_tokens // micro_batches + 1
  validation = job.stream(job.tokens + 1)
  # A change of the sequence length throws away what was fetched before.
  needed = (h.iterations * micro_batches + 16) * row
  texts.write_shards(job.folder / "data", validation, texts.training_text(job.rng, needed, row, h.vocab_size, job.data))
  for name, split in (("train_files", "train"), ("val_files", "val"), ("val_bytes_files", "val_bytes")):
    setattr(h, name, str(job.folder / "data" / f"fineweb_{split}_*.bin"))
  inputs, start = job.params(), {k: v.clone() for k, v in job.model.state_dict().items()}
  losses: list[float] = []
  scores: list[tuple[float, float]] = []

  class Recorded(module.GPT):
    """The script's model from the case's weights, of which the losses in training are kept."""

    def __init__(self, *args):
      super().__init__(*args)
      self.load_state_dict(start)
      self.register_forward_hook(lambda model, _, loss: losses.append(loss.item()) if model.training else None)

  evaluate = module.eval_val

  def recorded_scores(*args, **kwargs):
    scores.append(evaluate(*args, **kwargs))
    return scores[-1]

  module.GPT, module.eval_val = Recorded, recorded_scores
  stream = types.SimpleNamespace(
    val_tokens=torch.tensor(validation.tokens),
    val_bytes=torch.tensor(validation.token_bytes),
    caseops_enabled=True,
  )
  model = module.train_model(h, torch.device(job.device), stream)[0]
  averaged = evaluate(h, torch.device(job.device), stream, model)
  if len(losses) != h.iterations * micro_batches or not scores:
    raise UserError(
      f"The script's train_model computed {len(losses)} losses and {len(scores)} scores where {h.iterations} steps of "
      f"{micro_batches} micro-batches and one score were expected; it cannot be dumped."
    )
  expected = {
    "train_loss": np.array(losses).reshape(h.iterations, micro_batches).mean(1),
    **{f"val_loss_{name}": np.array([score[0]]) for name, score in (("raw", scores[-1]), ("ema", averaged))},
    **{f"val_bpb_{name}": np.array([score[1]]) for name, score in (("raw", scores[-1]), ("ema", averaged))},
    **as_arrays(dict(model.named_parameters()), "params_ema/"),
  }
  about = {"muon_dtype": "float32", "world_size": 1, "grad_accum_steps": micro_batches, "data": "data"}
  return Dumped(inputs, expected, about)


def quantize(job: Job) -> Dumped:
  """The script's quantiser on moments that it took from rows of the case's text."""
  h, module, model = job.h, job.module, job.model
  inputs = job.params()
  _set_looping(job, True)
  seq_len = min(job.max_doc_len, job.tokens)
  rows = max(job.tokens // seq_len, 1)

  class Batches:
    """Rows of new text at each call."""

    def next_batch(self, *_):
      tokens = torch.tensor(job.stream(rows * seq_len).tokens, dtype=torch.int64, device=job.device)
      return tokens.reshape(rows, seq_len), None

  count = h.gptq_calibration_batches
  hessians, rms = module.collect_hessians(model, Batches(), h, torch.device(job.device), n_calibration_batches=count)
  state = module._unbank_state_dict(model.state_dict(), h.num_layers)
  result, scheme = module.gptq_mixed_quantize(state, hessians, rms, h)
  used = {name for name, how in scheme.items() if how.startswith("gptq")}
  if not used:
    raise UserError(
      "No matrix of this model has more than 65,536 elements, so the script stores all of them as float16; choose a "
      "larger model, as in --set MODEL_DIM=272."
    )
  inputs |= as_arrays({name: value for name, value in hessians.items() if name in used}, "hessian/")
  inputs |= as_arrays({name: value for name, value in rms.items() if name in used}, "act_rms/")
  expected = {f"quantized/{name}": value.cpu().numpy().copy() for name, value in result.items()}
  expected |= as_arrays(module.dequantize_mixed(result, scheme, state), "dequantized/")
  return Dumped(inputs, expected, {"scheme": scheme})


def ngram(job: Job) -> Dumped:
  """The script's hints for a stream."""
  tokens = job.stream(job.tokens + 1).tokens.astype(np.uint16)
  with hints_of(job) as build:
    return Dumped({"tokens": tokens}, _hints(build(tokens[1:])), {})


@contextlib.contextmanager
def hints_of(job: Job):
  """Gives a function from targets [N] to the script's hints; its library is built in a folder of its own."""
  module, h = job.script.hints_module, job.h
  # Only the channels that look at words read the tokenizer, and they are off.
  job.script.places.replace(
    module,
    "build_piece_luts",
    lambda vocab_size, **_: (None, np.zeros(vocab_size, np.uint8), np.zeros(vocab_size, np.uint8)),
    "no tokenizer: the channels that look at words are off",
  )
  names = ("token_order", "token_threshold", "token_boost", "within_tau", "within_boost", "word_order")
  names += ("word_normalize", "word_tau", "word_boost", "agree_add_boost")
  with tempfile.TemporaryDirectory() as folder:
    if hasattr(module, "ONLINE_NGRAM_LIB"):
      module.ONLINE_NGRAM_LIB = Path(folder) / "hints.so"

    def build(targets: np.ndarray):
      return module.build_hints_for_targets(
        target_token_ids_np=targets,
        tokenizer_path="",
        vocab_size=h.vocab_size,
        log0=lambda text: job.script.printed.write(f"{text}\n"),
        **{name: getattr(h, name) for name in names if hasattr(h, name)},
      )

    yield build


def _hints(package: dict[str, np.ndarray]) -> Arrays:
  return {
    "hint_ids": package["hint_ids"].astype(np.int32),
    "gate_mask": package["gate_mask"].astype(np.uint8),
    "boost": package["boost"].astype(np.float32),
  }


def ttt(job: Job) -> Dumped:
  """The script's evaluation with test-time training: every loss, the adapters it drew, the weights it ended with."""
  h, module, model = job.h, job.module, job.model
  validation = job.stream(job.tokens + 1)
  inputs = {"tokens": validation.tokens, "token_bytes": validation.token_bytes, **job.params()}
  _set_looping(job, True)
  drawn: list[Arrays] = []
  nll_N = np.full(job.tokens, np.nan)
  bytes_N1 = torch.tensor(validation.token_bytes, device=job.device)

  class Drawn(module.BatchedTTTLoRA):
    """Adapters whose first A are kept."""

    def __init__(self, *args, **kwargs):
      super().__init__(*args, **kwargs)
      drawn.append(as_arrays({name: p for name, p in self.named_parameters() if name.endswith(".A")}))

  accumulate = module._accumulate_bpb

  def recorded(losses, x, y, *rest, y_bytes):
    """Keeps the loss of each target that counts; `y_bytes` has the targets' places in the stream."""
    offsets, lengths, positions = rest[:3]
    at = positions[: x.size(1)][None]
    counts = (at >= offsets[:, None]) & (at < (offsets + lengths)[:, None])
    nll_N[(y_bytes[counts] - 1).cpu().numpy()] = losses[counts].double().cpu().numpy()
    return accumulate(losses, x, y, *rest, y_bytes=bytes_N1[y_bytes.long()])

  module.BatchedTTTLoRA, module._accumulate_bpb = Drawn, recorded
  stream = types.SimpleNamespace(
    val_tokens=torch.tensor(validation.tokens),
    val_bytes=torch.arange(len(validation.tokens), dtype=torch.int32),
    caseops_enabled=True,
    base_bytes_lut=None,
    has_leading_space_lut=None,
    is_boundary_token_lut=None,
  )

  def step(x, y, lora, hint_ids=None):
    return model.forward_ttt(x, y, lora=lora, **({} if hint_ids is None else {"hint_ids": hint_ids}))

  expected: Arrays = {}
  h.run_id = f"pgolf-{uuid.uuid4()}"
  with hints_of(job) if getattr(h, "ngram_tilt_enabled", False) else contextlib.nullcontext() as build:
    hints = None
    if build is not None:
      expected = _hints(build(validation.tokens[1:].astype(np.uint16)))
      hints = tuple(torch.tensor(expected[name]) for name in ("hint_ids", "gate_mask", "boost"))
      hints = (hints[0].long(), hints[1].bool(), hints[2])
      del expected["boost"]
    try:
      loss, bpb = module.eval_val_ttt_phased(
        h, model, torch.device(job.device), stream, forward_ttt_train=step, precomputed_hints=hints
      )
    finally:
      for left in Path(tempfile.gettempdir()).glob(f"ttt_*{h.run_id}"):
        left.unlink()
  inputs |= {f"adapter_init/{k}/{name}": A for k, adapters in enumerate(drawn) for name, A in adapters.items()}
  expected |= {"nll": nll_N, "val_loss": np.array([loss]), "val_bpb": np.array([bpb])}
  return Dumped(inputs, expected | as_arrays(dict(model.named_parameters()), "params_after/"), {})


def _set_looping(job: Job, looping: bool) -> None:
  if hasattr(job.model, "looping_active"):
    job.model.looping_active = looping and job.h.num_loops > 0
  elif getattr(job.h, "num_loops", 0) > 0:
    raise UserError("The script's GPT has no looping_active, so the loop that its settings ask for cannot be switched.")


class Kind(NamedTuple):
  """A kind of case: what computes it, what a script must have for it, the sections of settings that count."""

  dump: Callable[[Job], Dumped]
  needs: tuple[str, ...]
  sections: tuple[str, ...]


KINDS = {
  "forward": Kind(forward, ("GPT.forward_logits",), ("model",)),
  "optimizer": Kind(optimizer, ("Optimizers",), ("model", "optimizer")),
  "train": Kind(train, ("train_model", "eval_val"), ("model", "optimizer", "train", "eval")),
  "quantize": Kind(
    quantize,
    ("collect_hessians", "_unbank_state_dict", "gptq_mixed_quantize", "dequantize_mixed"),
    ("model", "quantize"),
  ),
  "ngram": Kind(ngram, ("build_hints_for_targets",), ("hints",)),
  "ttt": Kind(
    ttt,
    ("eval_val_ttt_phased", "BatchedTTTLoRA", "_accumulate_bpb", "GPT.forward_ttt"),
    ("model", "eval", "ttt", "hints"),
  ),
}

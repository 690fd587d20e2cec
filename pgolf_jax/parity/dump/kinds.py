"""What a script computes for each kind of case."""

import contextlib
import itertools
import math
import tempfile
import types
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch

from pgolf_jax.data.shards import load_validation
from pgolf_jax.errors import UserError
from pgolf_jax.parity import Arrays
from pgolf_jax.parity.dump.job import Job, training_text, write_shards
from pgolf_jax.parity.dump.script import as_arrays
from pgolf_jax.parity.dump.stand_ins import recorded


def draw_row(job: Job) -> Arrays:
  """A packed row and the weights."""
  job.about["max_doc_len"] = job.max_doc_len
  return {"tokens": job.row(), **job.params()}


def forward(job: Job, inputs: Arrays) -> Arrays:
  """Loss, gradients and evaluation logits of one packed row, without and with the loop."""
  row = torch.tensor(inputs["tokens"], dtype=torch.int64, device=job.device)
  x, y, segments = row[None, :-1], row[None, 1:], job.segments(row[:-1])
  expected: Arrays = {}
  for looping in (False, True):
    prefix = f"loop{int(looping)}/"
    job.set_looping(looping)
    job.model.train()
    job.model.zero_grad(set_to_none=True)
    loss = job.model(x, y, **segments)
    loss.backward()
    grads = {name: p.grad for name, p in job.model.named_parameters() if p.grad is not None}
    job.model.eval()
    with torch.no_grad(), recorded(job.model, job.layers(looping)) as activations:
      logits = job.model.forward_logits(x, **segments)[0]
    expected |= as_arrays({"loss": loss.reshape(1), "logits": logits}, prefix) | as_arrays(grads, f"{prefix}grads/")
    if job.activations:
      expected |= as_arrays(activations, f"{prefix}activations/")
  return expected


def draw_gradients(job: Job) -> Arrays:
  """The weights, and their gradients on as many packed rows as there are steps."""
  model, h, inputs = job.model, job.h, job.params()
  first, last = (getattr(h, name, 0.95) for name in ("muon_momentum_warmup_start", "muon_momentum"))
  job.about["steps"] = [
    {"lr_scale": 0.7**k, "muon_momentum": first + (last - first) * k / max(job.steps - 1, 1)} for k in range(job.steps)
  ]
  job.about["muon_dtype"] = "float32"
  job.set_looping(True)
  model.train()
  for k in range(job.steps):
    row = torch.tensor(job.row(), dtype=torch.int64, device=job.device)
    model.zero_grad(set_to_none=True)
    model(row[None, :-1], row[None, 1:], **job.segments(row[:-1])).backward()
    inputs |= as_arrays({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, f"grads/{k}/")
  return inputs


def optimizer(job: Job, inputs: Arrays) -> Arrays:
  """Steps of the script's optimizers, at falling rates and rising momentum."""
  optimizers, named, expected = job.module.Optimizers(job.h, job.model), dict(job.model.named_parameters()), {}
  limit = job.h.grad_clip_norm if job.h.grad_clip_norm > 0 else math.inf
  for k, step in enumerate(job.about["steps"]):
    for name, p in named.items():
      given = inputs.get(f"grads/{k}/{name}")
      p.grad = None if given is None else torch.tensor(given, device=job.device)
    for group in (group for one in optimizers for group in one.param_groups):
      group["lr"] = group["base_lr"] * step["lr_scale"]
    for group in optimizers.optimizer_muon.param_groups:
      group["momentum"] = step["muon_momentum"]
    norm = torch.nn.utils.clip_grad_norm_([p for p in named.values() if p.requires_grad], limit)
    optimizers.step()
    expected |= as_arrays({f"grad_norm/{k}": norm.reshape(1)}) | as_arrays(named, f"params/{k}/")
  return expected


def draw_text(job: Job) -> Arrays:
  """The weights; the text goes into the case's `data/`."""
  h = job.h
  row = h.train_batch_tokens // h.grad_accum_steps + 1
  # A change of the sequence length throws away what was fetched before.
  needed = (h.iterations * h.grad_accum_steps + 16) * row
  text = training_text(job.rng, needed, row, h.vocab_size, job.data)
  write_shards(job.folder / "data", job.stream(job.tokens + 1), text)
  for name, split in (("train_files", "train"), ("val_files", "val"), ("val_bytes_files", "val_bytes")):
    setattr(h, name, str(job.folder / "data" / f"fineweb_{split}_*.bin"))
  job.about |= {"muon_dtype": "float32", "world_size": 1, "grad_accum_steps": h.grad_accum_steps, "data": "data"}
  return job.params()


def train(job: Job, inputs: Arrays) -> Arrays:
  """The script's own training loop by steps, and plain scores before and after averaging."""
  h, module, validation = job.h, job.module, load_validation(job.folder / "data")
  start = {name: value.clone() for name, value in job.model.state_dict().items()}
  losses: list[float] = []
  scores: list[tuple[float, float]] = []

  class Recorded(module.GPT):
    """The script's model from the case's weights, of which the losses in training are kept."""

    def __init__(self, *args):
      super().__init__(*args)
      self.load_state_dict(start)
      self.register_forward_hook(lambda model, _, loss: losses.append(loss.item()) if model.training else None)

  evaluate = module.eval_val

  def kept(*args, **kwargs):
    scores.append(evaluate(*args, **kwargs))
    return scores[-1]

  stream = types.SimpleNamespace(
    val_tokens=torch.tensor(validation.tokens),
    val_bytes=torch.tensor(validation.token_bytes),
    caseops_enabled=True,
  )
  with mock.patch.multiple(module, GPT=Recorded, eval_val=kept):
    model = module.train_model(h, torch.device(job.device), stream)[0]
  averaged = evaluate(h, torch.device(job.device), stream, model)
  if len(losses) != h.iterations * h.grad_accum_steps or not scores:
    raise UserError(
      f"The script's train_model computed {len(losses)} losses and {len(scores)} scores where {h.iterations} steps of "
      f"{h.grad_accum_steps} micro-batches and a score were expected; it cannot be dumped."
    )
  return {
    "train_loss": np.array(losses).reshape(h.iterations, h.grad_accum_steps).mean(1),
    **{f"val_loss_{name}": np.array([score[0]]) for name, score in (("raw", scores[-1]), ("ema", averaged))},
    **{f"val_bpb_{name}": np.array([score[1]]) for name, score in (("raw", scores[-1]), ("ema", averaged))},
    **as_arrays(dict(model.named_parameters()), "params_ema/"),
  }


def draw_moments(job: Job) -> Arrays:
  """The weights, and the moments that the script takes of every matrix's inputs on rows of text."""
  job.set_looping(True)
  seq_len = min(job.max_doc_len, job.tokens)
  rows = max(job.tokens // seq_len, 1)

  class Batches:
    """Rows of new text at each call."""

    def next_batch(self, *_):
      tokens = torch.tensor(job.stream(rows * seq_len).tokens, dtype=torch.int64, device=job.device)
      return tokens.reshape(rows, seq_len), None

  hessians, rms = job.module.collect_hessians(
    job.model, Batches(), job.h, torch.device(job.device), n_calibration_batches=job.h.gptq_calibration_batches
  )
  return job.params() | as_arrays(hessians, "hessian/") | as_arrays(rms, "act_rms/")


def quantize(job: Job, inputs: Arrays) -> Arrays:
  """The script's quantiser; moments of matrices that it does not quantise are taken out of the inputs."""
  module = job.module
  hessians, rms = (
    {name.removeprefix(kind): torch.tensor(value) for name, value in inputs.items() if name.startswith(kind)}
    for kind in ("hessian/", "act_rms/")
  )
  state = module._unbank_state_dict(job.model.state_dict(), job.h.num_layers)
  result, scheme = module.gptq_mixed_quantize(state, hessians, rms, job.h)
  used = {name for name, how in scheme.items() if how.startswith("gptq")}
  if not used:
    raise UserError(
      "No matrix of this model has more than 65,536 elements, so the script stores all of them as float16; choose a "
      "larger model, as in --set MODEL_DIM=272."
    )
  for name in [*hessians, *rms]:
    if name not in used:
      inputs.pop(f"hessian/{name}", None)
      inputs.pop(f"act_rms/{name}", None)
  job.about["scheme"] = scheme
  expected = {f"quantized/{name}": value.cpu().numpy().copy() for name, value in result.items()}
  return expected | as_arrays(module.dequantize_mixed(result, scheme, state), "dequantized/")


def draw_stream(job: Job) -> Arrays:
  """A stream of documents."""
  return {"tokens": job.stream(job.tokens + 1).tokens.astype(np.uint16)}


def ngram(job: Job, inputs: Arrays) -> Arrays:
  """The script's hints for a stream."""
  with hints_of(job) as build:
    return _hints(build(inputs["tokens"][1:]))


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


def draw_scored_stream(job: Job) -> Arrays:
  """A stream of documents, the bytes of its tokens, and the weights."""
  validation = job.stream(job.tokens + 1)
  return {"tokens": validation.tokens, "token_bytes": validation.token_bytes, **job.params()}


def ttt(job: Job, inputs: Arrays) -> Arrays:
  """The script's evaluation with test-time training: every loss, and the weights that it ends with.

  The adapters that the script draws are added to the inputs; those that are there already take the drawn ones' place.
  """
  h, module, model = job.h, job.module, job.model
  job.set_looping(True)
  nll_N, count = np.full(len(inputs["tokens"]) - 1, np.nan), itertools.count()
  bytes_N1 = torch.tensor(inputs["token_bytes"], device=job.device)

  class Drawn(module.BatchedTTTLoRA):
    """Adapters whose first A are kept, or given."""

    def __init__(self, *args, **kwargs):
      super().__init__(*args, **kwargs)
      k = next(count)
      for name, p in self.named_parameters():
        if name.endswith(".A"):
          drawn = as_arrays({name: p})[name]
          p.data.copy_(torch.tensor(inputs.setdefault(f"adapter_init/{k}/{name}", drawn)))

  accumulate = module._accumulate_bpb

  def kept(losses, x, y, *rest, y_bytes):
    """Keeps the loss of each target that counts; `y_bytes` has the targets' places in the stream."""
    offsets, lengths, positions = rest[:3]
    at = positions[: x.size(1)][None]
    counts = (at >= offsets[:, None]) & (at < (offsets + lengths)[:, None])
    nll_N[(y_bytes[counts] - 1).cpu().numpy()] = losses[counts].double().cpu().numpy()
    return accumulate(losses, x, y, *rest, y_bytes=bytes_N1[y_bytes.long()])

  stream = types.SimpleNamespace(
    val_tokens=torch.tensor(inputs["tokens"]),
    val_bytes=torch.arange(len(inputs["tokens"]), dtype=torch.int32),
    caseops_enabled=True,
    base_bytes_lut=None,
    has_leading_space_lut=None,
    is_boundary_token_lut=None,
  )

  def step(x, y, lora, hint_ids=None):
    return model.forward_ttt(x, y, lora=lora, **({} if hint_ids is None else {"hint_ids": hint_ids}))

  expected, hints = {}, None
  if getattr(h, "ngram_tilt_enabled", False):
    with hints_of(job) as build:
      expected = _hints(build(inputs["tokens"][1:].astype(np.uint16)))
    boost = torch.tensor(expected.pop("boost"))
    hints = torch.tensor(expected["hint_ids"]).long(), torch.tensor(expected["gate_mask"]).bool(), boost
  h.run_id = f"pgolf-{uuid.uuid4()}"
  try:
    with mock.patch.multiple(module, BatchedTTTLoRA=Drawn, _accumulate_bpb=kept):
      loss, bpb = module.eval_val_ttt_phased(
        h, model, torch.device(job.device), stream, forward_ttt_train=step, precomputed_hints=hints
      )
  finally:
    for left in Path(tempfile.gettempdir()).glob(f"ttt_*{h.run_id}"):
      left.unlink()
  expected |= {"nll": nll_N, "val_loss": np.array([loss]), "val_bpb": np.array([bpb])}
  return expected | as_arrays(dict(model.named_parameters()), "params_after/")


class Kind(NamedTuple):
  """A kind of case.

  Attributes:
    draw: makes the inputs.
    compute: the script's outputs from inputs, by the model that has their weights.
    needs: names that a script must have for it.
    sections: of the settings that count.
  """

  draw: Callable[[Job], Arrays]
  compute: Callable[[Job, Arrays], Arrays]
  needs: tuple[str, ...]
  sections: tuple[str, ...]


KINDS = {
  "forward": Kind(draw_row, forward, ("GPT.forward_logits",), ("model",)),
  "optimizer": Kind(draw_gradients, optimizer, ("Optimizers",), ("model", "optimizer")),
  "train": Kind(draw_text, train, ("train_model", "eval_val"), ("model", "optimizer", "train", "eval")),
  "quantize": Kind(
    draw_moments,
    quantize,
    ("collect_hessians", "_unbank_state_dict", "gptq_mixed_quantize", "dequantize_mixed"),
    ("model", "quantize"),
  ),
  "ngram": Kind(draw_stream, ngram, ("build_hints_for_targets",), ("hints",)),
  "ttt": Kind(
    draw_scored_stream,
    ttt,
    ("eval_val_ttt_phased", "BatchedTTTLoRA", "_accumulate_bpb", "GPT.forward_ttt"),
    ("model", "eval", "ttt", "hints"),
  ),
}

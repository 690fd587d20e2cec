"""Our outputs for a golden case, under the names of its expected file, made by the product's own code."""

import dataclasses
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pgolf_jax.errors import UserError
from pgolf_jax.model import params as parameters
from pgolf_jax.model.context import packed
from pgolf_jax.model.gpt import bind
from pgolf_jax.model.loss import packed_nll
from pgolf_jax.parity.case import Arrays, Case
from pgolf_jax.run_folder import RunFolder, read_metrics
from pgolf_jax.runtime.mesh import data_mesh
from pgolf_jax.scoring import plain
from pgolf_jax.settings import check
from pgolf_jax.training import optimizer as optimizers


def run(case: Case) -> Arrays:
  """Tensors by name. Raises UserError for a kind that is not known or that writes no tensors."""
  kinds = {
    "forward": _forward,
    "optimizer": _optimizer,
    "train": _train,
    "e2e": _e2e,
    "quantize": _quantize,
    "ngram": _ngram,
    "ttt": _ttt,
  }
  if case.kind not in kinds:
    raise UserError(f"{case.folder}: the kind {case.kind!r} is not known; there are {', '.join([*kinds, 'caseops'])}.")
  return {name: np.asarray(value) for name, value in kinds[case.kind](case).items()}


def _one_device():
  """Cases are of one rank; one device repeats its arithmetic whatever the machine has."""
  return data_mesh(jax.local_devices()[:1])


def _forward(case: Case) -> Arrays:
  config = case.settings.model
  params = {k: jnp.asarray(v) for k, v in case.params().items()}
  parameters.check(config, params, str(case.folder))
  tokens = jnp.asarray(case.inputs["tokens"], jnp.int32)[None]
  seq_len = case.about["max_doc_len"]
  dtype = jnp.dtype(case.about.get("dtype", "float32"))
  found: Arrays = {}
  for looping in (False, True):
    loss = lambda p, looping=looping: packed_nll(  # noqa: E731
      bind(config, p), tokens, looping=looping, seq_len=seq_len, dtype=dtype
    ).mean()
    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    prefix = f"loop{int(looping)}/"
    found[f"{prefix}loss"] = np.asarray(value)[None]
    found |= {f"{prefix}grads/{k}": g for k, g in grads.items() if k not in parameters.SOFTCAPS}
    found[f"{prefix}logits"] = _logits(config, params, tokens[:, :-1], looping, seq_len, dtype)
  return found


def _logits(config, params, tokens, looping: bool, seq_len: int, dtype) -> jax.Array:
  """Evaluation logits [T, V] of one packed row."""

  @jax.jit
  def logits(params):
    model = bind(config, params)
    context = packed(tokens, bos_id=config.bos_id, seq_len=seq_len, looping=looping, dtype=dtype)
    return model.evaluation_logits(model(tokens, context).hidden)[0]

  return logits(params)


def _optimizer(case: Case) -> Arrays:
  config = case.settings.optimizer
  params = {k: jnp.asarray(v) for k, v in case.params().items()}
  optimizer = optimizers.make(config)

  @jax.jit
  def step(params, state, grads, lr_scale, momentum):
    norm = optax.tree.norm(grads)
    grads = optimizers.clip(grads, norm, config.grad_clip_norm)
    updates, state = optimizer.update(grads, state, params, lr_scale=lr_scale, momentum=momentum)
    return optax.apply_updates(params, updates), state, norm

  state = optimizer.init(params)
  found: Arrays = {}
  for k, plan in enumerate(case.about["steps"]):
    grads = {
      name: jnp.asarray(case.inputs.get(f"grads/{k}/{name}", np.zeros(p.shape, p.dtype))) for name, p in params.items()
    }
    params, state, norm = step(params, state, grads, plan["lr_scale"], plan["muon_momentum"])
    found[f"grad_norm/{k}"] = np.asarray(norm)[None]
    found |= {f"params/{k}/{name}": value for name, value in params.items()}
  return found


def _train(case: Case) -> Arrays:
  from pgolf_jax.training.loop import Trainer

  settings = dataclasses.replace(case.settings, quantize=dataclasses.replace(case.settings.quantize, reserve_seconds=0))
  mesh = _one_device()
  check.check(settings, device_count=mesh.size)
  with tempfile.TemporaryDirectory() as folder:
    run = RunFolder(Path(folder), settings)
    initial = {k: jnp.asarray(v) for k, v in case.params().items()}
    parameters.check(settings.model, initial, str(case.folder))
    state, _ = Trainer(run, mesh, case.data, initial=initial).train()
    losses = [line["loss"] for line in read_metrics(run.metrics)]
  found: Arrays = {"train_loss": np.asarray(losses)}
  for name, params in (("raw", state.params), ("ema", state.average)):
    found |= _plain(case, params, name)
  return found | {f"params_ema/{k}": v for k, v in state.average.items()}


def _plain(case: Case, params, name: str) -> Arrays:
  params = {k: jnp.asarray(v) for k, v in params.items()}
  validation = plain.load_validation(case.data)
  score = plain.score(case.settings, params, validation, _one_device(), description=f"scoring {name}")
  return {f"val_loss_{name}": np.array([score.loss]), f"val_bpb_{name}": np.array([score.bpb])}


def _e2e(case: Case) -> Arrays:
  """Training from the given parameters; quantising from the reference's average, TTT from its dequantised weights."""
  from pgolf_jax.parity.ttt import run_case
  from pgolf_jax.quantize.stage import quantize_params

  found = _train(case)
  found |= _plain(
    case, quantize_params(case.settings, case.params("params_ema/", case.expected), case.data), "quantized"
  )
  validation = plain.load_validation(case.data)
  inputs = {f"params/{k}": v for k, v in case.params("params_dequantized/", case.expected).items()}
  inputs |= {"tokens": validation.tokens, "token_bytes": validation.token_bytes}
  scored = run_case(case.settings, inputs, _one_device())
  return found | {"val_loss_ttt": scored["val_loss"], "val_bpb_ttt": scored["val_bpb"]}


def _quantize(case: Case) -> Arrays:
  from pgolf_jax.parity.quantize import quantize_case

  moments = [case.params(prefix) for prefix in ("hessian/", "act_rms/")]
  return quantize_case(case.about["settings"], case.params(), *moments)


def _ngram(case: Case) -> Arrays:
  from pgolf_jax.scoring.hints import build_hints

  config = dataclasses.replace(case.settings.hints, table="reference")
  hints = build_hints(case.inputs["tokens"][1:].astype(np.int32), config)
  return {"hint_ids": hints.ids, "gate_mask": np.asarray(hints.gate, np.uint8), "boost": hints.boost}


def _ttt(case: Case) -> Arrays:
  from pgolf_jax.parity.ttt import run_case

  return run_case(case.settings, case.inputs, _one_device())


def run_caseops(case: Case, tokenizer: Path | None) -> list[dict]:
  """For each document of a `caseops` case: rewritten text, ids without the leading bos, bytes, and their sums.

  Args:
    tokenizer: the SentencePiece model; None looks for the one that the case names, beside it and in `../tokenizers`.
  """
  from pgolf_jax.data import caseops
  from pgolf_jax.data.sidecar import token_bytes
  from pgolf_jax.data.tokenizer import Tokenizer

  if tokenizer is None:
    name = case.about["tokenizer"]
    places = [case.folder / name, case.folder.parent.parent / "tokenizers" / name]
    tokenizer = next((p for p in places if p.exists()), None)
    if tokenizer is None:
      raise UserError(f"The tokenizer {name} is neither at {places[0]} nor at {places[1]}; give it with --tokenizer.")
  loaded = Tokenizer.load(tokenizer)
  found = []
  for line in (case.folder / "docs.jsonl").read_text(encoding="utf-8").splitlines():
    text = json.loads(line)["text"]
    coded = caseops.encode(text)
    ids = loaded.encode(coded)
    counts = token_bytes(loaded, coded, ids)
    size = len(text.encode())
    found.append(
      {
        "caseops": coded,
        "ids": ids.tolist(),
        "bytes": counts.tolist(),
        "utf8_bytes": size,
        "sum_bytes": int(counts.sum()),
      }
    )
  return found

"""Our outputs for a golden case, under the names of its expected file, computed by the product's own code."""

import dataclasses
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from pgolf_jax.data.validation import load_validation
from pgolf_jax.errors import UserError
from pgolf_jax.model import params as parameters
from pgolf_jax.model.context import packed
from pgolf_jax.model.gpt import bind
from pgolf_jax.model.loss import packed_nll
from pgolf_jax.parity import quantize, ttt
from pgolf_jax.parity.case import Arrays, Case, Outputs
from pgolf_jax.parity.caseops import run_caseops
from pgolf_jax.run_folder import RunFolder, read_metrics
from pgolf_jax.runtime.mesh import data_mesh
from pgolf_jax.scoring import plain
from pgolf_jax.scoring.hints import build_hints
from pgolf_jax.settings import check
from pgolf_jax.training import optimizer as optimizers
from pgolf_jax.training.loop import Trainer


def run(case: Case, mesh: Mesh | None = None) -> Outputs:
  """Computes a case. Products of float32 matrices are computed in float32 on every device.

  Args:
    mesh: the first device alone if not given, since the reference ran on one.

  Raises:
    UserError: the kind of the case is not known, or something that it needs is missing.
  """
  if case.kind not in KINDS:
    raise UserError(f"{case.folder}: the kind {case.kind!r} is not known; choose one of {', '.join(KINDS)}.")
  mesh = data_mesh(jax.local_devices()[:1]) if mesh is None else mesh
  with jax.default_matmul_precision("highest" if case.types.compute == "float32" else "default"):
    outputs = KINDS[case.kind](case, mesh)
  if isinstance(outputs, list):
    return outputs
  return {name: np.asarray(value) for name, value in outputs.items()}


def _forward(case: Case, mesh: Mesh) -> Arrays:
  config = case.settings.model
  params = _params(case)
  tokens_BxT1 = jnp.asarray(case.inputs["tokens"], jnp.int32)[None]
  segment = {"seq_len": case.about["max_doc_len"], "dtype": jnp.dtype(case.types.compute)}
  outputs: Arrays = {}
  for looping in (False, True):

    def loss(params, looping=looping):
      return packed_nll(bind(config, params), tokens_BxT1, looping=looping, **segment).mean()

    # One program for all, so that the forward pass that they share is compiled once.
    @jax.jit
    def loss_grads_logits(params, loss=loss, looping=looping):
      model = bind(config, params)
      context = packed(tokens_BxT1[:, :-1], bos_id=config.bos_id, looping=looping, **segment)
      logits_BxTxV = model.evaluation_logits(model(tokens_BxT1[:, :-1], context).hidden)
      return *jax.value_and_grad(loss)(params), logits_BxTxV[0]

    value, grads, logits_TxV = loss_grads_logits(params)
    prefix = f"loop{int(looping)}/"
    outputs[f"{prefix}loss"] = np.asarray(value)[None]
    outputs |= {f"{prefix}grads/{k}": g for k, g in grads.items() if k not in parameters.SOFTCAPS}
    outputs[f"{prefix}logits"] = logits_TxV
  return outputs


def _optimizer(case: Case, mesh: Mesh) -> Arrays:
  config = case.settings.optimizer
  optimizer = optimizers.make(config)

  @jax.jit
  def step(params, state, grads, lr_scale, momentum):
    norm = optax.tree.norm(grads)
    grads = optimizers.clip(grads, norm, config.grad_clip_norm)
    updates, state = optimizer.update(grads, state, params, lr_scale=lr_scale, momentum=momentum)
    return optax.apply_updates(params, updates), state, norm

  params = {name: jnp.asarray(value) for name, value in case.under("params/").items()}
  state = optimizer.init(params)
  outputs: Arrays = {}
  for k, plan in enumerate(case.about["steps"]):
    given = {name: case.inputs.get(f"grads/{k}/{name}") for name in params}
    grads = {name: jnp.zeros_like(params[name]) if g is None else jnp.asarray(g) for name, g in given.items()}
    params, state, norm = step(params, state, grads, plan["lr_scale"], plan["muon_momentum"])
    outputs[f"grad_norm/{k}"] = np.asarray(norm)[None]
    outputs |= {f"params/{k}/{name}": value for name, value in params.items()}
  return outputs


def _train(case: Case, mesh: Mesh) -> Arrays:
  settings = dataclasses.replace(case.settings, quantize=dataclasses.replace(case.settings.quantize, reserve_seconds=0))
  check.check(settings, device_count=mesh.size)
  with tempfile.TemporaryDirectory() as folder:
    run = RunFolder(Path(folder), settings)
    state, _ = Trainer(run, mesh, case.data, initial=_params(case)).train()
    losses = [line["loss"] for line in read_metrics(run.metrics)]
  outputs: Arrays = {"train_loss": np.asarray(losses)}
  outputs |= _plain_score(case, mesh, state.params, "raw") | _plain_score(case, mesh, state.average, "ema")
  return outputs | {f"params_ema/{name}": value for name, value in state.average.items()}


def _e2e(case: Case, mesh: Mesh) -> Arrays:
  """Trains, quantises and adapts; each part starts from the reference's weights, so that errors do not add up."""
  trained = _train(case, mesh)
  artifact = quantize.artifact_params(case.settings, case.expected_under("params_ema/"), case.data)
  validation = load_validation(case.data)
  inputs = {f"params/{name}": value for name, value in case.expected_under("params_dequantized/").items()}
  inputs |= {"tokens": validation.tokens, "token_bytes": validation.token_bytes}
  adapted = ttt.run_case(case.settings, inputs, mesh, dtype=case.types.compute)
  return {
    **trained,
    **_plain_score(case, mesh, artifact, "quantized"),
    "val_loss_ttt": adapted["val_loss"],
    "val_bpb_ttt": adapted["val_bpb"],
  }


def _quantize(case: Case, mesh: Mesh) -> Arrays:
  moments = (case.under("hessian/"), case.under("act_rms/"))
  return quantize.quantize_case(case.about["settings"], case.under("params/"), *moments)


def _ngram(case: Case, mesh: Mesh) -> Arrays:
  config = dataclasses.replace(case.settings.hints, table="reference")
  hints = build_hints(case.inputs["tokens"][1:].astype(np.int32), config)
  return {"hint_ids": hints.ids, "gate_mask": np.asarray(hints.gate, np.uint8), "boost": hints.boost}


def _ttt(case: Case, mesh: Mesh) -> Arrays:
  return ttt.run_case(case.settings, case.inputs, mesh, dtype=case.types.compute)


def _params(case: Case) -> parameters.Params:
  """The parameters that the case starts from; they are checked against its settings."""
  params = {name: jnp.asarray(value) for name, value in case.under("params/").items()}
  parameters.check(case.settings.model, params, str(case.folder))
  return params


def _plain_score(case: Case, mesh: Mesh, params, name: str) -> Arrays:
  """`val_loss_{name}` and `val_bpb_{name}` of parameters on the validation shards of the case."""
  params = {k: jnp.asarray(v) for k, v in params.items()}
  validation = load_validation(case.data)
  score = plain.score(case.settings, params, validation, mesh, description=f"scoring {name}")
  return {f"val_loss_{name}": np.array([score.loss]), f"val_bpb_{name}": np.array([score.bpb])}


KINDS = {
  "forward": _forward,
  "optimizer": _optimizer,
  "train": _train,
  "e2e": _e2e,
  "quantize": _quantize,
  "ngram": _ngram,
  "ttt": _ttt,
  "caseops": lambda case, mesh: run_caseops(case),
}
"""Kind of case → function of the case and the mesh that computes its outputs."""

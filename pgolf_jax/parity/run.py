"""Golden cases run by the code that trains, quantises and scores; outputs have the names of the expected file."""

import dataclasses
import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from pgolf_jax.data import caseops
from pgolf_jax.data.encode import token_bytes
from pgolf_jax.data.shards import ValidationData, load_validation
from pgolf_jax.data.tokenizer import Tokenizer
from pgolf_jax.errors import UserError
from pgolf_jax.model import packed
from pgolf_jax.model import params as parameters
from pgolf_jax.model.gpt import bind, packed_nll
from pgolf_jax.model.params import Params
from pgolf_jax.parity import Arrays, Case, Outputs
from pgolf_jax.parity.double import in_double
from pgolf_jax.quantize.artifact import read, writer
from pgolf_jax.quantize.calibrate import Calibration
from pgolf_jax.quantize.make import make, quantize
from pgolf_jax.run_folder import RunFolder, read_metrics
from pgolf_jax.runtime.distributed import data_mesh
from pgolf_jax.runtime.files import read_json_lines
from pgolf_jax.scoring import plain, ttt
from pgolf_jax.scoring.adapter_sets import Draw
from pgolf_jax.scoring.compiled import Programs
from pgolf_jax.scoring.hints import build_hints
from pgolf_jax.settings import ModelConfig, OptimizerConfig, Settings, check
from pgolf_jax.settings.load import from_env
from pgolf_jax.training import optimizer as optimizers
from pgolf_jax.training.loop import Trainer


def run_caseops(case: Case) -> list[dict]:
  """Rewritten text, ids without the leading bos, bytes per token and their sums, for each document of the case."""
  tokenizer = Tokenizer.load(case.tokenizer or _find_tokenizer(case))
  path = case.folder / "docs.jsonl"
  documents = [document.get("text") for document in read_json_lines(path)]
  if not all(isinstance(text, str) for text in documents):
    raise UserError(f'{path} has a line without a "text" that is a string.')
  return [_document(text, tokenizer) for text in documents]


def _document(text: str, tokenizer: Tokenizer) -> dict:
  coded = caseops.encode(text)
  ids = tokenizer.encode(coded)
  counts = token_bytes(tokenizer, coded, ids)
  return {
    "caseops": coded,
    "ids": ids.tolist(),
    "bytes": counts.tolist(),
    "utf8_bytes": len(text.encode()),
    "sum_bytes": int(counts.sum()),
  }


def _find_tokenizer(case: Case) -> Path:
  name = case.about["tokenizer"]
  places = [case.folder / name, case.folder.parent.parent / "tokenizers" / name]
  for path in places:
    if path.exists():
      return path
  raise UserError(f"The tokenizer {name} is neither at {places[0]} nor at {places[1]}; name it with --tokenizer.")


def quantize_case(
  environ: Mapping[str, str],
  params: Mapping[str, np.ndarray],
  hessian: Mapping[str, np.ndarray],
  act_rms: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
  """Returns `dequantized/{matrix}` of every parameter.

  Args:
    environ: settings under their environment names.
    params: fp32 parameters under their bank names.
    hessian: Hessian of the inputs, by matrix name.
    act_rms: root mean square of each input, by matrix name.
  """
  settings = from_env(environ)
  tensors = quantize(params, Calibration(hessian, act_rms), settings.quantize)
  data = writer.write({}, tensors, settings.quantize.codec)
  return {f"dequantized/{name}": tensor.dequantize() for name, tensor in read(data).tensors.items()}


def artifact_params(settings: Settings, params: Params, data: Path) -> Params:
  """Quantises parameters, calibrated on the training shards in `data`, and returns what the artifact stores of them."""
  return read(make(settings, params, data).data).params()


# The reference's name of each kind of adapter → ours.
_KINDS = {"q_loras": "q", "k_loras": "k", "v_loras": "v", "o_loras": "o", "mlp_loras": "mlp"}


def draw_from(inputs: Arrays) -> Draw:
  """Returns a function that gives A of adapter set k, by kind of adapter, from `adapter_init/{k}/{name}.A`.

  Its errors: UserError if the case has no set of that number, or one of another rank.
  """

  def draw(number: int, rank: int) -> Arrays:
    prefix = f"adapter_init/{number}/"
    given = {name.removeprefix(prefix): A for name, A in inputs.items() if name.startswith(prefix)}
    if not given:
      raise UserError(
        f"The case has no adapter set {number}, which its settings make the evaluator draw; add it to its inputs."
      )
    adapters = {"head": given["lm_head_lora.A"]}
    for name, kind in _KINDS.items():
      layers = [given[f"{name}.{p}.A"] for p in range(len(given)) if f"{name}.{p}.A" in given]
      if layers:
        adapters[kind] = np.stack(layers)
    if adapters["head"].shape[1] != rank:
      raise UserError(f"Adapter set {number} of the case has rank {adapters['head'].shape[1]}, not {rank}.")
    return adapters

  return draw


def run_case(settings: Settings, inputs: Arrays, mesh: Mesh, *, dtype: str = "float32") -> Arrays:
  """Scores a stream as the reference does, in its order of documents; returns outputs under the case's names.

  Args:
    inputs: `params/*`, `tokens`, `token_bytes`, and `adapter_init/*` unless adapters are to be drawn at random.
    dtype: of the computation.
  """
  replace = dataclasses.replace
  settings = replace(
    settings,
    ttt=replace(settings.ttt, order="reference", method="exact"),
    hints=replace(settings.hints, table="reference"),
    train=replace(settings.train, world_size=1, compute_dtype=dtype),
  )
  params = {k.removeprefix("params/"): v for k, v in inputs.items() if k.startswith("params/")}
  data = ValidationData(inputs["tokens"].astype(np.int32), inputs["token_bytes"].astype(np.int32))
  draw = draw_from(inputs) if any(name.startswith("adapter_init/") for name in inputs) else None
  evaluation = ttt.evaluate(settings, params, data, mesh, ttt.Options(draw=draw), _ttt_programs(settings, mesh))
  return {
    "nll": evaluation.nll_N.astype(np.float64),
    "val_loss": np.array([evaluation.score.loss]),
    "val_bpb": np.array([evaluation.score.bpb]),
    "hint_ids": evaluation.hint_N,
    "gate_mask": evaluation.gate_N.astype(np.uint8),
    **{f"params_after/{k}": np.asarray(v) for k, v in evaluation.params.items()},
  }


_ttt_programs = functools.lru_cache(maxsize=2)(Programs)
"""Settings and mesh → programs, which evaluations of the same settings share."""


def run(case: Case, mesh: Mesh | None = None) -> Outputs:
  """Computes a case. Products of float32 matrices are computed in float32 on every device.

  Args:
    mesh: the first device alone if not given, since the reference ran on one.

  Raises:
    UserError: the kind of the case is not known, its settings cannot work, or something that it needs is missing.
  """
  if case.kind not in KINDS:
    raise UserError(f"{case.folder}: the kind {case.kind} is not known; choose one of {', '.join(KINDS)}.")
  if case.kind != "caseops":
    check.check(case.settings)
  mesh = data_mesh(jax.local_devices()[:1]) if mesh is None else mesh
  with jax.default_matmul_precision("default" if case.types.compute == "bfloat16" else "highest"):
    outputs = KINDS[case.kind](case, mesh)
  if isinstance(outputs, list):
    return outputs
  return {name: np.asarray(value) for name, value in outputs.items()}


def _forward(case: Case, mesh: Mesh) -> Arrays:
  config, params = case.settings.model, _params(case)
  tokens_BxT1 = jnp.asarray(case.inputs["tokens"], jnp.int32)[None]
  segment = {"seq_len": case.about["max_doc_len"], "dtype": case.settings.train.compute_dtype}
  outputs: Arrays = {}
  for looping in (False, True):
    prefix = f"loop{int(looping)}/"
    # Without loops both passes are one program.
    program = _forward_program(config, looping=looping and config.num_loops > 0, **segment)
    value, grads, logits_TxV, activations = _call(case, program, params, tokens_BxT1)
    outputs |= {f"{prefix}activations/{name}": x for name, x in activations.items()}
    outputs |= {f"{prefix}logits": logits_TxV, f"{prefix}loss": np.asarray(value)[None]}
    outputs |= {f"{prefix}grads/{k}": g for k, g in grads.items() if k not in parameters.SOFTCAPS}
  return outputs


@functools.lru_cache(maxsize=4)
def _forward_program(config: ModelConfig, *, looping: bool, seq_len: int, dtype: str):
  """Returns (parameters, tokens [1, T + 1]) → (loss, its gradient, logits [T, V], activations by name, each [T, …]).

  One program for all, so that the forward pass that they share is compiled once; the cases of one model share it too.
  """
  segment = {"seq_len": seq_len, "looping": looping, "dtype": jnp.dtype(dtype)}

  def loss(params, tokens_BxT1):
    return packed_nll(bind(config, params), tokens_BxT1, **segment).mean()

  @jax.jit
  def program(params, tokens_BxT1):
    return *jax.value_and_grad(loss)(params, tokens_BxT1), *forward_pass(config, params, tokens_BxT1, **segment)

  return program


def forward_pass(
  config: ModelConfig, params: Params, tokens_BxT1: jax.Array, *, seq_len: int, looping: bool, dtype
) -> tuple[jax.Array, Arrays]:
  """Returns the evaluation logits of a packed row, [T, V], and its activations by name, each [T, …].

  Args:
    tokens_BxT1: one row of T + 1 tokens.
    seq_len: longest segment.
  """
  model, activations = bind(config, params), {}

  def keep(name: str, x_Bx: jax.Array) -> None:
    activations[name] = x_Bx[0]

  tokens_BxT = tokens_BxT1[:, :-1]
  context = packed(tokens_BxT, bos_id=config.bos_id, seq_len=seq_len, looping=looping, dtype=dtype)
  hidden_BxTxD = model(tokens_BxT, context._replace(tap=keep)).hidden
  return model.evaluation_logits(hidden_BxTxD)[0], activations


def _call(case: Case, program, *arguments):
  """Runs a program in the type of the case."""
  return in_double(program, *arguments) if case.types.compute == "float64" else program(*arguments)


def _optimizer(case: Case, mesh: Mesh) -> Arrays:
  config = case.settings.optimizer
  start = case.under("params/")
  # The reference's optimizers skip what has no gradient.
  steps = range(len(case.about["steps"]))
  unused = {name for name in start if not any(f"grads/{k}/{name}" in case.inputs for k in steps)}
  optimizer = optimizers.make(config, model=case.settings.model, unused=unused)
  step = _optimizer_program(config, case.settings.model, frozenset(unused))
  params = {name: jnp.asarray(value) for name, value in start.items()}
  state = optimizer.init(params)
  outputs: Arrays = {}
  for k, plan in enumerate(case.about["steps"]):
    given = {name: case.inputs.get(f"grads/{k}/{name}") for name in params}
    grads = {name: jnp.zeros_like(params[name]) if g is None else jnp.asarray(g) for name, g in given.items()}
    schedule = jnp.float32(plan["lr_scale"]), jnp.float32(plan["muon_momentum"])
    params, state, norm = _call(case, step, params, state, grads, *schedule)
    outputs[f"grad_norm/{k}"] = np.asarray(norm)[None]
    outputs |= {f"params/{k}/{name}": value for name, value in params.items()}
  return outputs


@functools.lru_cache(maxsize=4)
def _optimizer_program(config: OptimizerConfig, model: ModelConfig, unused: frozenset[str]):
  optimizer = optimizers.make(config, model=model, unused=unused)

  @jax.jit
  def step(params, state, grads, lr_scale, momentum):
    norm = optax.tree.norm(grads)
    grads = optimizers.clip(grads, norm, config.grad_clip_norm)
    updates, state = optimizer.update(grads, state, params, lr_scale=lr_scale, momentum=momentum)
    return optax.apply_updates(params, updates), state, norm

  return step


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
  artifact = artifact_params(case.settings, case.expected_under("params_ema/"), case.data)
  validation = load_validation(case.data)
  inputs = {f"params/{name}": value for name, value in case.expected_under("params_dequantized/").items()}
  inputs |= {"tokens": validation.tokens, "token_bytes": validation.token_bytes}
  adapted = run_case(case.settings, inputs, mesh, dtype=case.types.compute)
  return {
    **trained,
    **_plain_score(case, mesh, artifact, "quantized"),
    "val_loss_ttt": adapted["val_loss"],
    "val_bpb_ttt": adapted["val_bpb"],
  }


def _quantize(case: Case, mesh: Mesh) -> Arrays:
  moments = (case.under("hessian/"), case.under("act_rms/"))
  return quantize_case(case.about["settings"], case.under("params/"), *moments)


def _ngram(case: Case, mesh: Mesh) -> Arrays:
  config = dataclasses.replace(case.settings.hints, table="reference")
  hints = build_hints(case.inputs["tokens"][1:].astype(np.int32), config)
  return {"hint_ids": hints.ids, "gate_mask": np.asarray(hints.gate, np.uint8), "boost": hints.boost}


def _ttt(case: Case, mesh: Mesh) -> Arrays:
  return run_case(case.settings, case.inputs, mesh, dtype=case.types.compute)


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

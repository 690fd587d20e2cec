"""The golden `ttt` case: our evaluator starts from the adapters and weights that the reference started from."""

import dataclasses

import numpy as np
from jax.sharding import Mesh

from pgolf_jax.data.validation import ValidationData
from pgolf_jax.errors import UserError
from pgolf_jax.parity.case import Arrays
from pgolf_jax.scoring import ttt
from pgolf_jax.scoring.adapter_sets import Draw
from pgolf_jax.settings.config import Settings

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
  evaluation = ttt.evaluate(settings, params, data, mesh, ttt.Options(draw=draw))
  return {
    "nll": evaluation.nll_N.astype(np.float64),
    "val_loss": np.array([evaluation.score.loss]),
    "val_bpb": np.array([evaluation.score.bpb]),
    "hint_ids": evaluation.hint_N,
    "gate_mask": evaluation.gate_N.astype(np.uint8),
    **{f"params_after/{k}": np.asarray(v) for k, v in evaluation.params.items()},
  }

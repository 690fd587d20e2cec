"""A golden case of test-time training, run by our evaluator: A of every adapter set comes from the case."""

import dataclasses

import numpy as np
from jax.sharding import Mesh

from pgolf_jax.data.validation import ValidationData
from pgolf_jax.errors import UserError
from pgolf_jax.scoring import ttt
from pgolf_jax.scoring.adapter_sets import Draw
from pgolf_jax.settings.config import Settings

_KINDS = {"q_loras": "q", "k_loras": "k", "v_loras": "v", "o_loras": "o", "mlp_loras": "mlp"}


def draw_from(inputs: dict[str, np.ndarray]) -> Draw:
  """Adapter sets in the order in which the case made them, from `adapter_init/{k}/{name}.A`.

  Raises:
    UserError: a set is asked for that the case does not have.
  """

  def draw(number: int, rank: int) -> dict[str, np.ndarray]:
    prefix = f"adapter_init/{number}/"
    found = {name.removeprefix(prefix): A for name, A in inputs.items() if name.startswith(prefix)}
    if not found:
      raise UserError(f"The case has no adapter set {number}; does it draw A anew for every batch?")
    sets = {}
    for name, kind in _KINDS.items():
      layers = [found[f"{name}.{p}.A"] for p in range(len(found)) if f"{name}.{p}.A" in found]
      if layers:
        sets[kind] = np.stack(layers)
    sets["head"] = found["lm_head_lora.A"]
    if sets["head"].shape[1] != rank:
      raise UserError(f"Adapter set {number} of the case has rank {sets['head'].shape[1]}, not {rank}.")
    return sets

  return draw


def run_case(settings: Settings, inputs: dict[str, np.ndarray], mesh: Mesh) -> dict[str, np.ndarray]:
  """Outputs of a `ttt` case under the names of its expected file; float32, in the reference's order.

  Args:
    inputs: `params/*`, `tokens`, `token_bytes`, `adapter_init/*`.
  """
  replace = dataclasses.replace
  settings = replace(
    settings,
    ttt=replace(settings.ttt, order="reference", method="exact"),
    hints=replace(settings.hints, table="reference"),
    train=replace(settings.train, world_size=1, compute_dtype="float32"),
  )
  params = {k.removeprefix("params/"): v for k, v in inputs.items() if k.startswith("params/")}
  data = ValidationData(inputs["tokens"].astype(np.int32), inputs["token_bytes"].astype(np.int32))
  drawn = any(name.startswith("adapter_init/") for name in inputs)
  options = ttt.Options(draw=draw_from(inputs) if drawn else None)
  found = ttt.evaluate(settings, params, data, mesh, options)
  return {
    "nll": found.nll_N.astype(np.float64),
    "val_loss": np.array([found.score.loss]),
    "val_bpb": np.array([found.score.bpb]),
    "hint_ids": found.hint_N,
    "gate_mask": found.gate_N.astype(np.uint8),
    **{f"params_after/{k}": np.asarray(v) for k, v in found.params.items()},
  }

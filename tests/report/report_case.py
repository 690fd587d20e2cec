"""A run folder with known figures, made without training: its data, its stages' results, its scores by target."""

import dataclasses
import io
import json
import math

import artifact_samples
import numpy as np

from pgolf_jax.data.shards import load_validation, shard_path, write_shard
from pgolf_jax.quantize.artifact import writer
from pgolf_jax.run_folder import RunFolder
from pgolf_jax.runtime.files import file_hash
from pgolf_jax.scoring.documents import find_documents
from pgolf_jax.settings import DataConfig, EvalConfig, LengthStage, Settings, TrainConfig

STEPS = 40
TRAIN = TrainConfig(
  iterations=STEPS, batch_tokens=1024, micro_batches=1, world_size=1, seq_len=64,
  seq_schedule=(LengthStage(32, 0.5), LengthStage(64, 1.0)), schedule_mode="step", max_wallclock_seconds=0.0,
)  # fmt: skip
CHECKS = (
  ("every target scored exactly once", True, "<b>all</b> of them"),
  ("one order explains every score", True, "acyclic"),
  ("clock: training", None, "it was not made"),
)


def settings_of(folder, seed: int = 42, **changes) -> Settings:
  """Settings of a run on the data in `folder`."""
  evaluation = EvalConfig(batch_tokens=512, seq_len=64)
  made = Settings(seed=seed, data=DataConfig(path=str(folder)), train=TRAIN, eval=evaluation)
  return dataclasses.replace(made, **changes)


def write_data(folder, documents: int = 12, seed: int = 0) -> np.ndarray:
  """Writes a validation split of so many documents; returns the bytes of its targets."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(20, 400, documents)
  tokens = np.concatenate([np.append(1, rng.integers(8, 300, n)) for n in lengths])
  text_bytes = np.where(tokens == 1, 0, rng.integers(1, 5, len(tokens)))
  folder.mkdir(parents=True, exist_ok=True)
  write_shard(shard_path(folder, "val", 0), tokens)
  write_shard(shard_path(folder, "val_bytes", 0), text_bytes)
  return tokens


def write_run(path, settings: Settings, *, until: str = "audit", seed: int = 0) -> RunFolder:
  """Writes a run whose stages are complete until this one, with random scores.

  The artifact costs 2 nats a target or so, learning saves 0.2 of them, and every tenth target has a hint, of which 3 of
  4 are right.
  """
  run = RunFolder(path, settings)
  rng = np.random.default_rng(seed)
  lines = [
    {"step": k, "loss": 5 - 2.5 * k / STEPS + 0.05 * rng.standard_normal(), "grad_norm": 0.5, "lr_scale": 1 - k / STEPS,
     "momentum": 0.95, "seq_len": 32 if k <= STEPS // 2 else 64, "looping": k > STEPS // 2, "progress": k / STEPS,
     "seconds": 0.5 * k} for k in range(1, STEPS + 1)
  ]  # fmt: skip
  run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
  data = load_validation(settings.data.path)
  tokens, text_bytes = np.asarray(data.tokens), np.asarray(data.token_bytes)
  targets, num_bytes = len(tokens) - 1, int(text_bytes[1:].sum())
  plain = (2 + 0.3 * rng.standard_normal(targets)).astype(np.float32)
  learnt = (plain - 0.2).astype(np.float32)
  gate = np.arange(targets) % 10 == 0
  right = gate & (np.arange(targets) % 40 != 0)
  nll = np.where(right, learnt - 0.5, np.where(gate, learnt + 0.1, learnt)).astype(np.float32)

  def score(x) -> dict:
    loss = float(x.mean(dtype=np.float64))
    bpb = loss * targets / num_bytes / math.log(2)
    return {"loss": loss, "bpb": bpb, "targets": targets, "bytes": num_bytes, "seconds": 2.5}

  def finish(stage: str, result: dict, **made_from) -> bool:
    run.finish(stage, result | {"stage_seconds": 3.0}, {"config": "c", **made_from})
    return stage == until

  train = {"steps": STEPS, "seconds": 20.0, "tokens": STEPS * 1024, "tokens_per_second": 2048.0, "parameters": 12345,
           "weights": "w", "devices": 2, "device": "NVIDIA H100 80GB HBM3", "compile_and_warm_up_seconds": 4.0,
           "recompilations_in_clock": 0}  # fmt: skip
  if until == "none" or finish("train", train):
    return run
  if finish("plain", score(plain + 0.001)):
    return run
  run.artifact.write_bytes(writer.write({"model": {}}, artifact_samples.sample_tensors(), "zstd"))
  save(run.artifact_nll, plain)
  made = score(plain) | {"artifact_bytes": run.artifact.stat().st_size, "code_bytes": 777, "calibrate": 1.0}
  if finish("artifact", made):
    return run
  run.scores.mkdir()
  for name, x in (("nll", nll), ("model_nll", learnt), ("hint_nll", learnt), ("times", np.ones(targets, np.uint8))):
    save(run.scores / f"{name}.npy", x)
  documents = []
  for document in find_documents(tokens, 1):
    part = document.target_slice
    documents.append(
      {"document": document.index, "batch": 0, "start": document.start, "targets": document.targets,
       "bytes": int(text_bytes[part.start + 1 : part.stop + 1].sum()), "nats": float(nll[part].sum(dtype=np.float64)),
       "nats_untilted": float(learnt[part].sum(dtype=np.float64)), "hints": int(gate[part].sum()),
       "right": int((gate & (nll < learnt))[part].sum())}
    )  # fmt: skip
  (run.scores / "documents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in documents))
  ttt = score(nll) | {
    "bpb_without_hints": score(learnt)["bpb"], "gated": int(gate.sum()), "order": "strict", "method": "cached",
    "hint_seconds": 0.25, "global_phase_seconds": 0.5, "compile_seconds": 1.0,
  }  # fmt: skip
  if finish("ttt", ttt, **{"artifact.pgolf": file_hash(run.artifact)}):
    return run
  checks = [{"name": name, "passed": passed, "finding": finding} for name, passed, finding in CHECKS]
  finish("audit", {"broken": [], "unproved": {}, "is_legal": False, "checks": checks})
  return run


def save(path, x: np.ndarray) -> None:
  buffer = io.BytesIO()
  np.save(buffer, x)
  path.write_bytes(buffer.getvalue())

"""A model small enough to evaluate in seconds, and a stream of random documents."""

import jax
import numpy as np

from pgolf_jax.data.shards import ValidationData
from pgolf_jax.model import params as parameters
from pgolf_jax.settings import (
  EvalConfig,
  HintConfig,
  LoRAConfig,
  ModelConfig,
  PhaseConfig,
  Settings,
  ShortConfig,
  TrainConfig,
  TTTConfig,
  load,
)

SETTINGS = Settings(
  model=ModelConfig(
    vocab_size=48,
    num_layers=2,
    model_dim=32,
    num_heads=4,
    num_kv_heads=2,
    mlp_mult=2.0,
    num_loops=1,
    loop_start=1,
    loop_end=1,
    parallel_start_layer=1,
    xsa_last_n=2,
    rope_dims=4,
  ),
  train=TrainConfig(world_size=1, batch_tokens=512, micro_batches=1, compute_dtype="float32"),
  eval=EvalConfig(batch_tokens=512, micro_batches=1, seq_len=48),
  ttt=TTTConfig(
    batch_size=3,
    seq_len=48,
    chunk_size=8,
    lora=LoRAConfig(rank=4, lr=0.01),
    short=ShortConfig(score_first=False),
    phase=PhaseConfig(prefix_docs=0, chunk_tokens=96, lr=0.02),
  ),
  hints=HintConfig(order=4, threshold=0.5),
)


def changed(settings: Settings, **ttt) -> Settings:
  """`settings` with other TTT settings: `phase__prefix_docs=3` changes ttt.phase.prefix_docs."""
  return load.changed(settings, {f"ttt.{name.replace('__', '.')}": value for name, value in ttt.items()})


def random_params(seed: int = 0) -> dict[str, np.ndarray]:
  """Parameters of which none is at its neutral initial value."""
  shapes = parameters.init(SETTINGS.model, jax.random.key(seed))
  rng = np.random.default_rng(seed)
  return {
    name: np.asarray(value)
    if name in parameters.SOFTCAPS
    else (np.asarray(value) + rng.normal(0, 0.2, value.shape)).astype(np.float32)
    for name, value in shapes.items()
  }


def random_documents(lengths: list[int], seed: int = 0) -> ValidationData:
  """Documents of these numbers of tokens (their bos counted) that share a phrase, so that hints occur."""
  rng = np.random.default_rng(seed)
  phrase = rng.integers(2, SETTINGS.model.vocab_size, 23)
  parts = []
  for length in lengths:
    body = rng.integers(2, SETTINGS.model.vocab_size, length - 1)
    at = rng.integers(0, max(length - 24, 1))
    body[at : at + 23] = phrase[: len(body[at : at + 23])]
    parts.append(np.concatenate([[SETTINGS.model.bos_id], body]))
  tokens = np.concatenate(parts).astype(np.int32)
  return ValidationData(tokens, np.where(tokens == SETTINGS.model.bos_id, 0, 1 + tokens % 5).astype(np.int32))


def chained_documents(lengths: list[int], seed: int = 0) -> ValidationData:
  """Documents of few tokens, each followed by one of two: contexts come again and again, and hints are often wrong."""
  rng = np.random.default_rng(seed)
  successors = rng.integers(2, 18, (48, 2))
  tokens = []
  for length in lengths:
    tokens += [SETTINGS.model.bos_id, int(rng.integers(2, 18))]
    tokens += [0] * (length - 2)
    for i in range(len(tokens) - length + 2, len(tokens)):
      tokens[i] = int(successors[tokens[i - 1], int(rng.random() < 0.3)])
  tokens = np.array(tokens, np.int32)
  return ValidationData(tokens, np.where(tokens == SETTINGS.model.bos_id, 0, 1 + tokens % 5).astype(np.int32))

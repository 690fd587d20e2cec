"""A model of two layers whose matrices are just large enough for GPTQ, its settings, and a little data."""

import dataclasses
import functools

import jax
import numpy as np

from pgolf_jax.data.shards import shard_path, write_shard
from pgolf_jax.model import params as parameters
from pgolf_jax.settings import EvalConfig, LengthStage, ModelConfig, QuantizeConfig, Settings, TrainConfig

MODEL = ModelConfig(
  vocab_size=320,
  num_layers=2,
  model_dim=272,
  num_heads=4,
  num_kv_heads=4,
  mlp_mult=1.0,
  num_loops=1,
  loop_start=0,
  loop_end=1,
  parallel_start_layer=1,
  rope_dims=8,
  xsa_last_n=2,
)
SETTINGS = Settings(
  model=MODEL,
  train=TrainConfig(
    batch_tokens=512,
    micro_batches=8,
    world_size=1,
    seq_len=32,
    seq_schedule=(LengthStage(32, 1.0),),
    compute_dtype="float32",
  ),
  eval=EvalConfig(batch_tokens=512, seq_len=32),
  quantize=QuantizeConfig(calibration_batches=5),
)


@functools.cache
def random_params(seed: int = 0) -> dict[str, np.ndarray]:
  """Initial weights plus noise, so that no matrix is zero."""
  initial = jax.jit(functools.partial(parameters.init, MODEL))(jax.random.key(seed))
  rng = np.random.default_rng(seed)
  noise = {name: 0.02 * rng.standard_normal(shape, np.float32) for name, shape in parameters.shapes(MODEL).items()}
  return {name: np.asarray(initial[name]) + noise[name] for name in noise}


def write_data(folder, seed: int = 0) -> None:
  """Two train shards, one validation shard and its sidecar, of random documents."""
  rng = np.random.default_rng(seed)

  def tokens(count):
    stream = rng.integers(8, MODEL.vocab_size, count)
    stream[:: rng.integers(20, 40)] = 1
    stream[0] = 1
    return stream

  folder.mkdir(parents=True, exist_ok=True)
  for index in range(2):
    write_shard(shard_path(folder, "train", index), tokens(500 + 100 * index))
  validation = tokens(400)
  write_shard(shard_path(folder, "val", 0), validation)
  write_shard(shard_path(folder, "val_bytes", 0), np.where(validation == 1, 0, 3))


def with_quantize(**changes) -> Settings:
  return dataclasses.replace(SETTINGS, quantize=dataclasses.replace(SETTINGS.quantize, **changes))

"""`pgolf bench train`: loss and gradient of the recipe's looped model, beside the same model in eager PyTorch."""

import statistics
import time


def train(tokens: int = 4096, seq_len: int = 1024, repeats: int = 5, dtype: str = "float32") -> None:
  """Time forward and gradient of the record's model, looping on, with the whole optimizer step as a third figure.

  Ours packs the tokens into one row of segments of `seq_len`; PyTorch, where it is installed, gets them as rows.
  The two are timed in turn, so that a machine that slows down slows both.

  Example: pgolf bench train --tokens 4096 --repeats 5

  Args:
    tokens: of a step.
    seq_len: of a segment.
    repeats: of every measurement, after one that is not counted.
    dtype: float32 or bfloat16.
  """
  import dataclasses

  import jax
  import jax.numpy as jnp
  import numpy as np

  from pgolf_jax import cache
  from pgolf_jax.model import params as parameters
  from pgolf_jax.model.gpt import packed_nll
  from pgolf_jax.settings import Settings
  from pgolf_jax.training.step import data_mesh, init_state, make_step, place_rows

  cache.use_compile_cache()
  config = Settings().model
  rows = np.random.default_rng(0).integers(2, config.vocab_size, (tokens // seq_len, seq_len + 1)).astype(np.int32)
  packed = np.concatenate([rows[:, :-1].reshape(-1), rows[-1, -1:]])[None]
  params = parameters.init(config, jax.random.key(0))
  # Output matrices start at zero, which would make half of the backward pass trivial.
  params = {k: v if v.any() else 0.02 * jax.random.normal(jax.random.key(1), v.shape) for k, v in params.items()}

  def loss(params, row):
    return packed_nll(config, params, row, looping=True, seq_len=seq_len, dtype=jnp.dtype(dtype)).mean()

  began = time.perf_counter()
  forward = jax.jit(loss).lower(params, packed).compile()
  gradient = jax.jit(jax.value_and_grad(loss)).lower(params, packed).compile()
  print(f"compiled in {time.perf_counter() - began:.1f} s")
  work = {
    "forward": {"ours": lambda: jax.block_until_ready(forward(params, packed))},
    "gradient": {"ours": lambda: jax.block_until_ready(gradient(params, packed))},
  }
  work |= _torch_work(config, params, rows, dtype, work)

  settings = Settings()
  train_settings = dataclasses.replace(
    settings.train, batch_tokens=tokens, micro_batches=1, world_size=1, compute_dtype=dtype
  )
  settings = dataclasses.replace(settings, train=train_settings)
  mesh = data_mesh(jax.devices()[:1])
  step = make_step(settings, mesh, params, seq_len=seq_len, looping=True)
  state = [init_state(settings, mesh, params)]
  placed = place_rows(mesh, packed.astype(np.uint16))

  def whole_step():
    state[0], metrics = step(state[0], placed, np.float32(1e-3), np.float32(0.95))
    jax.block_until_ready(metrics)

  work["step"] = {"ours": whole_step}

  flops = _flops(config, tokens, seq_len)
  print(f"{'':<12}{'':<8}{'seconds':>9}{'tokens/s':>11}{'GFLOP/s':>10}{'ours / it':>11}")
  for name, sides in work.items():
    times = _in_turn(sides, repeats)
    for side, seconds in times.items():
      ratio = statistics.median(o / t for o, t in zip(times["ours"], seconds, strict=True))
      middle = statistics.median(seconds)
      done = flops * (1 if name == "forward" else 3) / middle / 1e9
      speed = "" if side == "ours" else f"{1 / ratio:>10.2f}×"
      print(f"{name:<12}{side:<8}{middle:>9.2f}{tokens / middle:>11,.0f}{done:>10.0f}{speed:>11}")


def _in_turn(sides: dict, repeats: int) -> dict[str, list[float]]:
  times: dict[str, list[float]] = {side: [] for side in sides}
  for count in range(repeats + 1):
    for side, run in sides.items():
      began = time.perf_counter()
      run()
      if count:
        times[side].append(time.perf_counter() - began)
  return times


def _torch_work(config, params, rows, dtype: str, work: dict) -> dict:
  try:
    import torch
  except ImportError:
    print("PyTorch is not installed; `pip install pgolf_jax[torch]` adds its figures.")
    return {}
  import numpy as np

  from pgolf_jax.bench._torch_gpt import TorchGPT

  model = TorchGPT(config, {k: np.asarray(v) for k, v in params.items()}, getattr(torch, dtype))
  tokens = torch.tensor(rows, dtype=torch.long)

  def forward():
    with torch.no_grad():
      return model.loss(tokens)

  def gradient():
    for value in model.params.values():
      value.grad = None
    model.loss(tokens).backward()

  ours = float(work["forward"]["ours"]())
  print(f"loss ours {ours:.6f}, PyTorch {float(forward()):.6f} (PyTorch {torch.__version__})")
  return {"forward": work["forward"] | {"torch": forward}, "gradient": work["gradient"] | {"torch": gradient}}


def _flops(config, tokens: int, seq_len: int) -> float:
  """Of a forward pass: two per weight and token for every use of a matrix, and causal attention's two products."""
  from pgolf_jax.model.params import layer_order

  D, positions = config.model_dim, sum(map(len, layer_order(config, True)))
  layer = 2 * D * D + 2 * D * config.kv_dim + 2 * D * config.mlp_dim + seq_len * D
  return 2.0 * tokens * (positions * layer + config.vocab_size * D)


COMMAND = train

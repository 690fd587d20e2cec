"""Settings that cannot work, each by itself or together, refused before anything starts."""

import math

from pgolf_jax.errors import UserError
from pgolf_jax.settings import Settings
from pgolf_jax.settings.load import flattened, shown

MAX_PARAMETERS = 2**28  # 1 GiB of fp32 weights

_COUNT, _LENGTH, _INDEX = (1, 2**20), (1, 2**31 - 1), (0, 2**31 - 1)
_POSITIVE, _NOT_NEGATIVE, _SHARE, _BELOW_ONE = (1e-30, 1e30), (0.0, 1e30), (0.0, 1.0), (0.0, 1 - 2**-53)
_BITS = (2, 8)
_RANGES: dict[str, tuple[float, float]] = {
  "model.vocab_size": (1, 2**16),  # a shard's tokens have 16 bits
  "model.num_layers": (1, 1000),
  "model.model_dim": (1, 2**16),
  "model.num_heads": (1, 2**16),
  "model.num_kv_heads": (1, 2**16),
  "model.mlp_mult": (1e-3, 1e3),
  "model.num_loops": (0, 100),
  "model.gate_window": (1, 2**16),
  "model.rope_base": _POSITIVE,
  "model.sparse_attn_gate_init_std": _NOT_NEGATIVE,
  "model.logit_softcap": _POSITIVE,
  "model.tied_embed_init_std": _NOT_NEGATIVE,
  **{f"model.{name}": _INDEX for name in ("parallel_start_layer", "xsa_last_n", "rope_dims", "bos_id")},
  **{f"optimizer.{name}": _NOT_NEGATIVE for name in ("matrix_lr", "muon_wd", "embed_lr", "embed_wd", "scalar_lr")},
  **{f"optimizer.{name}": _NOT_NEGATIVE for name in ("adam_wd", "adam_eps", "grad_clip_norm")},
  **{f"optimizer.{name}": _SHARE for name in ("muon_momentum", "muon_momentum_warmup_start")},
  **{f"optimizer.{name}": _BELOW_ONE for name in ("beta1", "beta2")},
  **{f"optimizer.{name}": _INDEX for name in ("muon_momentum_warmup_steps", "muon_steps")},
  **{f"train.{name}": _INDEX for name in ("iterations", "seq_change_warmup_steps", "warmdown_iters", "warmup_steps")},
  **{f"train.{name}": _INDEX for name in ("log_every", "val_loss_every", "stop_step", "checkpoint_every_steps")},
  **{f"train.{name}": _NOT_NEGATIVE for name in ("max_wallclock_seconds", "min_lr", "checkpoint_every_seconds")},
  "train.batch_tokens": _LENGTH,
  "train.micro_batches": _COUNT,
  "train.world_size": (0, 2**20),
  "train.seq_len": _LENGTH,
  "train.enable_looping_at": _NOT_NEGATIVE,
  "train.warmdown_frac": _SHARE,
  "train.ema_decay": _BELOW_ONE,
  "eval.batch_tokens": _LENGTH,
  "eval.micro_batches": _COUNT,
  "eval.seq_len": _LENGTH,
  "ttt.batch_size": _COUNT,
  "ttt.seq_len": _LENGTH,
  "ttt.chunk_size": _LENGTH,
  "ttt.lora.rank": (1, 2**16),
  "ttt.short.rank": (1, 2**16),
  "ttt.lora.grad_steps": (0, 1000),
  **{f"ttt.lora.{name}": _NOT_NEGATIVE for name in ("alpha", "lr", "lr_mult", "weight_decay")},
  **{f"ttt.lora.{name}": _BELOW_ONE for name in ("beta1", "beta2", "warm_start_mean_momentum")},
  **{f"ttt.lora.{name}": _INDEX for name in ("warm_start_mean_doc_len", "train_min_doc_len", "train_max_doc_len")},
  **{f"ttt.short.{name}": _NOT_NEGATIVE for name in ("lr", "weight_decay")},
  "ttt.short.beta2": _BELOW_ONE,
  "ttt.short.doc_len": _INDEX,
  "ttt.short.chunk_size": _LENGTH,
  **{f"ttt.phase.{name}": _INDEX for name in ("prefix_docs", "epochs", "chunk_tokens", "batch_seqs", "warmup_chunks")},
  **{f"ttt.phase.{name}": _NOT_NEGATIVE for name in ("lr", "grad_clip", "warmup_start_lr")},
  "ttt.phase.count": _COUNT,
  "ttt.phase.momentum": _BELOW_ONE,
  "hints.order": (1, 32),  # the published list of coefficients ends with the one for pairs of order 32
  "hints.boost": (-50.0, 50.0),
  **{f"quantize.{name}": _BITS for name in ("matrix_bits", "embed_bits", "awq_bits", "lqer_factor_bits")},
  **{f"quantize.{name}_clip_sigmas": _POSITIVE for name in ("matrix", "attn", "mlp", "embed")},
  **{f"quantize.{name}": _COUNT for name in ("calibration_batches", "calibration_micro_batches")},
  **{f"quantize.{name}": _COUNT for name in ("block_size", "awq_group_size", "lqer_asym_group")},
  **{f"quantize.{name}": _INDEX for name in ("awq_group_top_k", "lqer_top_k", "budget_bytes", "fp16_up_to")},
  "quantize.lqer_rank": (1, 64),
  "quantize.reserve_seconds": _NOT_NEGATIVE,
  "quantize.damping": _NOT_NEGATIVE,
  "seed": (0, 2**63 - 1),
}
"""Setting → the least and the largest value that it can have."""


def check(settings: Settings, *, device_count: int | None = None) -> None:
  """Raises UserError with the numbers and a valid choice."""
  _check_ranges(settings)
  _check_model(settings)
  _check_train(settings, device_count)
  _check_eval(settings)
  _check_ttt(settings)


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise UserError(message)


def _divisor_near(n: int, want: int) -> int:
  """The divisor of n nearest to `want`."""
  small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
  return min((d for s in small for d in (s, n // s)), key=lambda d: (abs(d - want), d))


def _check_ranges(settings: Settings) -> None:
  for name, value in flattened(settings).items():
    numbers = [n for item in (value if isinstance(value, tuple) else [value]) for n in _numbers(item)]
    _require(
      not any(n != n or n in (math.inf, -math.inf) for n in numbers), f"{name} must be finite, not {shown(value)}."
    )
    low, high = _RANGES.get(name, (-math.inf, math.inf))
    _require(all(low <= n <= high for n in numbers), f"{name}={shown(value)} must lie in {low} … {high}.")


def _numbers(value: object) -> list[float]:
  """The numbers in a setting, or in an item of a schedule."""
  return [n for n in (value if isinstance(value, tuple) else [value]) if isinstance(n, int | float)]


def _check_model(settings: Settings) -> None:
  m = settings.model
  matrices = m.num_layers * (2 * m.model_dim + 2 * m.kv_dim + 2 * m.mlp_dim) * m.model_dim
  count = m.vocab_size * m.model_dim + matrices
  _require(
    m.mlp_dim >= 1 and count <= MAX_PARAMETERS,
    f"The model has {count} parameters and an MLP of width {m.mlp_dim}; at most {MAX_PARAMETERS} parameters and at "
    "least a width of 1 are possible.",
  )
  _require(
    m.model_dim % m.num_heads == 0,
    f"model.num_heads={m.num_heads} must divide model.model_dim={m.model_dim}; "
    f"{_divisor_near(m.model_dim, m.num_heads)} does.",
  )
  _require(
    m.num_heads % m.num_kv_heads == 0,
    f"model.num_kv_heads={m.num_kv_heads} must divide model.num_heads={m.num_heads}; "
    f"{_divisor_near(m.num_heads, m.num_kv_heads)} does.",
  )
  rotating = m.rope_dims or m.head_dim
  _require(
    rotating % 2 == 0 and rotating <= m.head_dim,
    f"model.rope_dims={m.rope_dims} must be even and at most the head width {m.head_dim}.",
  )
  _require(
    m.gate_window <= m.model_dim,
    f"model.gate_window={m.gate_window} must be at most model.model_dim={m.model_dim}.",
  )
  _require(
    0 < m.leaky_relu_sq_slope <= 1,
    f"model.leaky_relu_sq_slope={m.leaky_relu_sq_slope} must lie in (0, 1]; 0.3 is usual.",
  )
  if m.num_loops > 0:
    _require(
      0 <= m.loop_start <= m.loop_end < m.num_layers,
      f"model.loop_start={m.loop_start} and model.loop_end={m.loop_end} must be layers from 0 to {m.num_layers - 1}, "
      "start first; or set model.num_loops=0.",
    )
  decoder = m.layer_order(looping=True)[1]
  lanes = next((i for i, layer in enumerate(decoder) if layer >= m.parallel_start_layer > 0), len(decoder))
  below = [layer for layer in decoder[lanes:] if layer < m.parallel_start_layer]
  _require(
    not below,
    f"model.parallel_start_layer={m.parallel_start_layer} splits the lanes inside the loop, which comes back to layer "
    f"{below[0] if below else 0}; use at least model.loop_end + 1 = {m.loop_end + 1}, or 0 for one lane.",
  )


def _check_train(settings: Settings, device_count: int | None) -> None:
  t = settings.train
  _require(
    t.batch_tokens % t.micro_batches == 0,
    f"train.batch_tokens={t.batch_tokens} must be a multiple of train.micro_batches={t.micro_batches}; "
    f"{max(t.batch_tokens // t.micro_batches, 1) * t.micro_batches} is.",
  )
  row = t.batch_tokens // t.micro_batches
  for seq_len, _ in t.length_stages:
    _require(
      row % seq_len == 0,
      f"The sequence length {seq_len} must divide the micro-batch of {row} tokens "
      f"(train.batch_tokens={t.batch_tokens} / train.micro_batches={t.micro_batches}); "
      f"{_divisor_near(row, seq_len)} does.",
    )
  _require(
    t.schedule_mode == "step"
    or t.max_wallclock_seconds == 0
    or t.max_wallclock_seconds > settings.quantize.reserve_seconds,
    f"train.max_wallclock_seconds={t.max_wallclock_seconds} must exceed "
    f"quantize.reserve_seconds={settings.quantize.reserve_seconds}.",
  )
  world = t.world_size or device_count
  if world is not None:
    _require(
      t.micro_batches % world == 0,
      f"The number of ranks, {world}, must divide train.micro_batches={t.micro_batches}; "
      f"{_divisor_near(t.micro_batches, world)} does.",
    )
  if device_count is not None:
    _require(
      t.micro_batches % device_count == 0,
      f"{device_count} devices cannot share train.micro_batches={t.micro_batches}: they must divide it; "
      f"{_divisor_near(t.micro_batches, device_count)} devices would do.",
    )
    _require(
      settings.optimizer.clip_scope == "global" or world == 1 or world % device_count == 0,
      f"optimizer.clip_scope='rank' needs each of the {world} ranks on one device, but there are {device_count}; "
      "use clip_scope='global'.",
    )


def _check_eval(settings: Settings) -> None:
  e = settings.eval
  span = e.batch_tokens // e.micro_batches
  _require(
    span >= e.seq_len,
    f"eval.batch_tokens={e.batch_tokens} cut into eval.micro_batches={e.micro_batches} spans leaves {span} tokens to "
    f"each, fewer than eval.seq_len={e.seq_len}; set eval.batch_tokens to at least {e.seq_len * e.micro_batches}.",
  )
  _require(0 < e.doc_fraction <= 1, f"eval.doc_fraction={e.doc_fraction} must lie in (0, 1].")


def _check_ttt(settings: Settings) -> None:
  t = settings.ttt
  short = [step.size for step in t.short.score_first_steps] or [t.short.chunk_size]
  longest = max([t.chunk_size, *(short if t.short.score_first else [])])
  _require(t.seq_len >= longest, f"ttt.seq_len={t.seq_len} must hold a chunk of {longest} targets; 3072 is usual.")
  if t.phase.prefix_docs > 0 and t.phase.epochs > 0:
    _require(
      t.phase.chunk_tokens >= settings.eval.seq_len and t.phase.batch_seqs > 0,
      f"ttt.phase.chunk_tokens={t.phase.chunk_tokens} holds no row of eval.seq_len={settings.eval.seq_len} tokens; "
      "make it a multiple, or set ttt.phase.prefix_docs=0 to leave the global phase out.",
    )

"""Combinations of settings that cannot work, refused before anything starts."""

from pgolf_jax.errors import UserError
from pgolf_jax.settings import Settings


def check(settings: Settings, *, device_count: int | None = None) -> None:
  """Raises UserError with the numbers and a valid choice."""
  _check_model(settings)
  _check_train(settings, device_count)
  _check_eval(settings)
  _check_ttt(settings)


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise UserError(message)


def _divisor_near(n: int, want: int) -> int:
  """The divisor of n nearest to `want`."""
  return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - want))


def _check_model(settings: Settings) -> None:
  m = settings.model
  for name in ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "gate_window"):
    _require(getattr(m, name) > 0, f"model.{name}={getattr(m, name)} must be positive.")
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
  _require(m.logit_softcap > 0, f"model.logit_softcap={m.logit_softcap} must be positive; 30 is usual.")
  if m.num_loops > 0:
    _require(
      0 <= m.loop_start <= m.loop_end < m.num_layers,
      f"model.loop_start={m.loop_start} and model.loop_end={m.loop_end} must be layers from 0 to {m.num_layers - 1}, "
      "start first; or set model.num_loops=0.",
    )


def _check_train(settings: Settings, device_count: int | None) -> None:
  t = settings.train
  _require(t.micro_batches > 0, f"train.micro_batches={t.micro_batches} must be positive.")
  _require(
    t.batch_tokens > 0 and t.batch_tokens % t.micro_batches == 0,
    f"train.batch_tokens={t.batch_tokens} must be a positive multiple of train.micro_batches={t.micro_batches}; "
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
  _require(0 <= t.ema_decay < 1, f"train.ema_decay={t.ema_decay} must lie in [0, 1).")
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
  _require(e.micro_batches > 0, f"eval.micro_batches={e.micro_batches} must be positive; 8 is the recipe's.")
  span = e.batch_tokens // e.micro_batches
  _require(
    span >= e.seq_len,
    f"eval.batch_tokens={e.batch_tokens} cut into eval.micro_batches={e.micro_batches} spans leaves {span} tokens to "
    f"each, fewer than eval.seq_len={e.seq_len}; set eval.batch_tokens to at least {e.seq_len * e.micro_batches}.",
  )
  _require(0 < e.doc_fraction <= 1, f"eval.doc_fraction={e.doc_fraction} must lie in (0, 1].")
  # The published list of coefficients ends with the one for pairs of order 32.
  _require(1 <= settings.hints.order <= 32, f"hints.order={settings.hints.order} must lie in 1 … 32; 16 is usual.")


def _check_ttt(settings: Settings) -> None:
  t = settings.ttt
  positive = {
    "batch_size": t.batch_size,
    "chunk_size": t.chunk_size,
    "lora.rank": t.lora.rank,
    "short.rank": t.short.rank,
    "phase.count": t.phase.count,
  }
  for name, value in positive.items():
    _require(value is None or value > 0, f"ttt.{name}={value} must be positive.")
  steps = t.lora.grad_steps
  _require(steps >= 0, f"ttt.lora.grad_steps={steps} must not be negative; 0 scores without learning.")
  short = [step.size for step in t.short.score_first_steps] or [t.short.chunk_size]
  longest = max([t.chunk_size, *(short if t.short.score_first else [])])
  _require(t.seq_len >= longest, f"ttt.seq_len={t.seq_len} must hold a chunk of {longest} targets; 3072 is usual.")
  shares = {
    "lora.beta1": t.lora.beta1,
    "lora.beta2": t.lora.beta2,
    "short.beta2": t.short.beta2,
    "lora.warm_start_mean_momentum": t.lora.warm_start_mean_momentum,
  }
  for name, value in shares.items():
    _require(value is None or 0 <= value < 1, f"ttt.{name}={value} must lie in [0, 1).")
  if t.phase.prefix_docs > 0 and t.phase.epochs > 0:
    _require(
      t.phase.chunk_tokens >= settings.eval.seq_len and t.phase.batch_seqs > 0,
      f"ttt.phase.chunk_tokens={t.phase.chunk_tokens} holds no row of eval.seq_len={settings.eval.seq_len} tokens; "
      "make it a multiple, or set ttt.phase.prefix_docs=0 to leave the global phase out.",
    )

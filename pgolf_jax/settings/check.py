"""Combinations of settings that cannot work, refused before anything starts."""

from pgolf_jax.errors import UserError
from pgolf_jax.scoring.chunks import parse_steps
from pgolf_jax.settings.config import Settings
from pgolf_jax.training.schedule import parse_scale_schedule, parse_seq_schedule


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
  for _, seq_len in parse_seq_schedule(t.seq_schedule, t.seq_len):
    _require(
      row % seq_len == 0,
      f"The sequence length {seq_len} must divide the micro-batch of {row} tokens "
      f"(train.batch_tokens={t.batch_tokens} / train.micro_batches={t.micro_batches}); "
      f"{_divisor_near(row, seq_len)} does.",
    )
  parse_scale_schedule(t.midrun_cap_schedule)
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
  row = e.batch_tokens // settings.train.micro_batches
  _require(
    row >= e.seq_len,
    f"eval.batch_tokens={e.batch_tokens} gives each of {settings.train.micro_batches} rows {row} tokens, fewer than "
    f"eval.seq_len={e.seq_len}; at least {e.seq_len * settings.train.micro_batches} is needed.",
  )
  _require(0 < e.doc_fraction <= 1, f"eval.doc_fraction={e.doc_fraction} must lie in (0, 1].")
  # The published list of coefficients ends with the one for pairs of order 32.
  _require(1 <= settings.hints.order <= 32, f"hints.order={settings.hints.order} must lie in 1 … 32; 16 is usual.")


def _check_ttt(settings: Settings) -> None:
  t = settings.ttt
  for name in ("batch_size", "chunk_size", "lora_rank", "short_lora_rank", "num_phases"):
    _require(getattr(t, name) is None or getattr(t, name) > 0, f"ttt.{name}={getattr(t, name)} must be positive.")
  _require(t.grad_steps >= 0, f"ttt.grad_steps={t.grad_steps} must not be negative; 0 scores without learning.")
  sizes = [size for _, size in parse_steps(t.short_score_first_steps)] or [t.short_chunk_size]
  longest = max([t.chunk_size, *(sizes if t.short_score_first else [])])
  _require(
    t.seq_len >= longest,
    f"ttt.seq_len={t.seq_len} must hold a chunk of {longest} targets; 3072 is usual.",
  )
  for name in ("beta1", "beta2", "short_beta2", "warm_start_mean_momentum"):
    value = getattr(t, name)
    _require(value is None or 0 <= value < 1, f"ttt.{name}={value} must lie in [0, 1).")
  _require(
    all(x.strip().isdigit() for x in t.eval_batches.split(",") if x.strip()),
    f"ttt.eval_batches={t.eval_batches!r} must be numbers of batches, as in 1,5,20.",
  )
  if t.prefix_docs > 0 and t.global_epochs > 0:
    _require(
      t.global_chunk_tokens >= settings.eval.seq_len and t.global_batch_seqs > 0,
      f"ttt.global_chunk_tokens={t.global_chunk_tokens} holds no row of eval.seq_len={settings.eval.seq_len} tokens; "
      "make it a multiple, or set ttt.prefix_docs=0 to leave the global phase out.",
    )

"""Settings that cannot work, each by itself or together, refused before anything starts."""

import itertools
import math

from pgolf_jax.errors import UserError
from pgolf_jax.settings import Settings, schedules
from pgolf_jax.settings.fields import every_setting
from pgolf_jax.settings.load import flattened

MAX_PARAMETERS = 2**28  # 1 GiB of fp32 weights


def check(settings: Settings, *, device_count: int | None = None) -> None:
  """Raises UserError with the numbers and a valid choice."""
  _check_ranges(settings)
  _check_model(settings)
  _check_train(settings, device_count)
  _check_eval(settings)
  _check_ttt(settings)
  _check_hints(settings)


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise UserError(message)


def _divisor_near(n: int, want: int) -> int:
  """The divisor of n nearest to `want`."""
  small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
  return min((d for s in small for d in (s, n // s)), key=lambda d: (abs(d - want), d))


def _check_ranges(settings: Settings) -> None:
  """Checks every number again, for settings that were made in Python rather than read."""
  values = flattened(settings)
  for entry in every_setting(Settings):
    value = values[entry.name]
    if isinstance(value, tuple):
      schedules.check(entry.name, value, entry.within)
    elif entry.within and value is not None:
      schedules.check(entry.name, (value,), (entry.within,))


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
  _require(
    m.dense_skips < m.num_layers,
    f"model.dense_skips={m.dense_skips} must be less than the {m.num_layers} layers; the last one needs no skip.",
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
    t.max_wallclock_seconds == 0 or t.max_wallclock_seconds > settings.quantize.reserve_seconds,
    f"train.max_wallclock_seconds={t.max_wallclock_seconds} must exceed "
    f"quantize.reserve_seconds={settings.quantize.reserve_seconds}.",
  )
  o, m = settings.optimizer, settings.model
  for kind, heads in (("q", m.num_heads), ("k", m.num_kv_heads), ("v", m.num_kv_heads)):
    _require(
      o.muon_heads == 0 or kind not in o.muon_heads_of or heads % o.muon_heads == 0,
      f"optimizer.muon_heads={o.muon_heads} must divide the {heads} heads of {kind} "
      f"(optimizer.muon_heads_of={o.muon_heads_of}); {_divisor_near(heads, o.muon_heads)} does.",
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
      f"optimizer.clip_scope=rank needs each of the {world} ranks on one device, but there are {device_count}; "
      "set optimizer.clip_scope=global.",
    )


def _check_eval(settings: Settings) -> None:
  e = settings.eval
  span = e.batch_tokens // e.micro_batches
  _require(
    span >= e.seq_len,
    f"eval.batch_tokens={e.batch_tokens} cut into eval.micro_batches={e.micro_batches} spans leaves {span} tokens to "
    f"each, fewer than eval.seq_len={e.seq_len}; set eval.batch_tokens to at least {e.seq_len * e.micro_batches}.",
  )


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


def _check_hints(settings: Settings) -> None:
  h = settings.hints
  _require(
    all(longer > shorter for longer, shorter in itertools.pairwise(h.orders)),
    f"hints.backoff={','.join(map(str, h.backoff))} must be different numbers below hints.order={h.order}.",
  )
  _require(
    h.strength == "fixed" or settings.ttt.order == "strict",
    "hints.strength=mixture learns from the documents scored before, in one order; it needs ttt.order=strict.",
  )

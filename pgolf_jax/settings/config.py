"""Every setting, in nested frozen dataclasses; each knows the environment name under which the recipe's users know it.

A config comes from a TOML file, then environment variables, then the command line, each over the one before.
Defaults are the values of the record run. `configs/` holds whole configs.
"""

import dataclasses
import difflib
import os
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pgolf_jax.errors import UserError
from pgolf_jax.settings.values import FIXED, checked, nearest, parse_env, refuse_unsupported


def _env(default, name: str):
  """A field that the environment variable `name` sets too."""
  return dataclasses.field(default=default, metadata={"env": name})


@dataclasses.dataclass(frozen=True)
class DataConfig:
  # Folder of shards, byte sidecar and tokenizer; "default" prepares the embedded speeches on first use.
  path: str = _env("default", "DATA_PATH")
  # SentencePiece model; empty means tokenizer.model in the data folder.
  tokenizer: str = _env("", "TOKENIZER_PATH")
  # Whether text was rewritten by CaseOps, so that bytes come from the sidecar.
  caseops: bool = _env(True, "CASEOPS_ENABLED")
  # The reference throws away two prefetched micro-batches when the sequence length changes; so do we, if true.
  discard_prefetched: bool = True


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  vocab_size: int = _env(8192, "VOCAB_SIZE")  # V
  num_layers: int = _env(11, "NUM_LAYERS")  # L, physical layers
  model_dim: int = _env(512, "MODEL_DIM")  # D
  num_heads: int = _env(8, "NUM_HEADS")  # H
  num_kv_heads: int = _env(4, "NUM_KV_HEADS")  # K
  mlp_mult: float = _env(4.0, "MLP_MULT")  # F / D
  num_loops: int = _env(2, "NUM_LOOPS")  # extra passes over layers loop_start … loop_end
  loop_start: int = _env(3, "LOOP_START")
  loop_end: int = _env(5, "LOOP_END")
  parallel_start_layer: int = _env(8, "PARALLEL_START_LAYER")  # first layer with two residual lanes; 0: none
  parallel_final_lane: Literal["mean", "attn", "mlp"] = _env("mean", "PARALLEL_FINAL_LANE")
  xsa_last_n: int = _env(11, "XSA_LAST_N")  # last layers whose heads drop their own value's direction
  rope_dims: int = _env(16, "ROPE_DIMS")  # leading dimensions of a head that rotate; 0: all
  rope_base: float = _env(10000.0, "ROPE_BASE")
  qk_gain_init: float = _env(5.25, "QK_GAIN_INIT")
  leaky_relu_sq_slope: float = _env(0.3, "LEAKY_RELU_SQ_SLOPE")
  ln_scale: bool = _env(True, "LN_SCALE")  # divide each norm by √(layer + 1)
  gate_window: int = _env(12, "GATE_WINDOW")  # leading dimensions that gates read
  smear_gate: bool = _env(True, "SMEAR_GATE_ENABLED")
  skip_gates: bool = _env(True, "SKIP_GATES_ENABLED")
  sparse_attn_gate: bool = _env(True, "SPARSE_ATTN_GATE_ENABLED")
  sparse_attn_gate_scale: float = _env(0.5, "SPARSE_ATTN_GATE_SCALE")
  sparse_attn_gate_init_std: float = _env(0.0, "SPARSE_ATTN_GATE_INIT_STD")
  logit_softcap: float = _env(30.0, "LOGIT_SOFTCAP")
  asym_logit_rescale: bool = _env(True, "ASYM_LOGIT_RESCALE")  # evaluation caps of their own for z > 0 and z ≤ 0
  tied_embed_init_std: float = _env(0.005, "TIED_EMBED_INIT_STD")
  bos_id: int = 1

  @property
  def head_dim(self) -> int:
    """C, width of a head."""
    return self.model_dim // self.num_heads

  @property
  def kv_dim(self) -> int:
    return self.num_kv_heads * self.head_dim

  @property
  def mlp_dim(self) -> int:
    """F, width of the MLP's hidden layer."""
    return int(self.mlp_mult * self.model_dim)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  matrix_lr: float = _env(0.026, "MATRIX_LR")
  muon_wd: float = _env(0.095, "MUON_WD")
  muon_momentum: float = _env(0.97, "MUON_MOMENTUM")
  muon_momentum_warmup_start: float = _env(0.92, "MUON_MOMENTUM_WARMUP_START")
  muon_momentum_warmup_steps: int = _env(1500, "MUON_MOMENTUM_WARMUP_STEPS")
  muon_steps: int = _env(5, "MUON_BACKEND_STEPS")
  muon_row_normalize: bool = _env(True, "MUON_ROW_NORMALIZE")
  muon_dtype: Literal["bfloat16", "float32"] = "bfloat16"
  embed_lr: float = _env(0.03, "TIED_EMBED_LR")
  embed_wd: float = _env(0.085, "EMBED_WD")
  scalar_lr: float = _env(0.02, "SCALAR_LR")
  adam_wd: float = _env(0.02, "ADAM_WD")
  beta1: float = _env(0.9, "BETA1")
  beta2: float = _env(0.99, "BETA2")
  adam_eps: float = _env(1e-8, "ADAM_EPS")
  grad_clip_norm: float = _env(0.3, "GRAD_CLIP_NORM")
  # Clip each rank's gradient before the average, as the reference does, or the averaged gradient.
  clip_scope: Literal["rank", "global"] = "rank"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  iterations: int = _env(20000, "ITERATIONS")
  max_wallclock_seconds: float = _env(600.0, "MAX_WALLCLOCK_SECONDS")  # 0: no cap, steps alone
  batch_tokens: int = _env(786432, "TRAIN_BATCH_TOKENS")  # tokens of a step, over all ranks
  micro_batches: int = 8  # packed rows of a step, over all ranks
  world_size: int = _env(0, "WORLD_SIZE")  # ranks that share out the stream; 0: one per device
  seq_len: int = _env(3072, "TRAIN_SEQ_LEN")  # longest segment where there is no schedule
  seq_schedule: str = _env("1024@0.100,2048@0.700,3072@1.000", "TRAIN_SEQ_SCHEDULE")
  schedule_mode: Literal["wallclock", "step"] = _env("wallclock", "TRAIN_SEQ_SCHEDULE_MODE")
  seq_change_warmup_steps: int = _env(32, "SEQ_CHANGE_WARMUP_STEPS")
  enable_looping_at: float = _env(0.35, "ENABLE_LOOPING_AT")
  warmdown_frac: float = _env(0.85, "WARMDOWN_FRAC")
  warmdown_iters: int = _env(0, "WARMDOWN_ITERS")
  min_lr: float = _env(0.1, "MIN_LR")
  midrun_cap_schedule: str = _env("", "MIDRUN_CAP_SCHEDULE")  # scale@progress, … further factors on every lr
  ema_decay: float = _env(0.9965, "EMA_DECAY")
  warmup_steps: int = _env(20, "WARMUP_STEPS")  # run in each looping mode before the clock starts, then undone
  compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
  log_every: int = _env(500, "TRAIN_LOG_EVERY")
  val_loss_every: int = _env(0, "VAL_LOSS_EVERY")
  stop_step: int = _env(0, "FORCE_STOP_STEP")  # stop after this many steps; 0: do not
  checkpoint_every_seconds: float = 120.0
  checkpoint_every_steps: int = 0  # 0: by time alone


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  batch_tokens: int = _env(524288, "VAL_BATCH_TOKENS")  # tokens in flight, over all ranks
  seq_len: int = _env(3072, "EVAL_SEQ_LEN")
  doc_fraction: float = _env(1.0, "VAL_DOC_FRACTION")  # share of the validation documents that TTT scores


@dataclasses.dataclass(frozen=True)
class TTTConfig:
  enabled: bool = _env(True, "TTT_ENABLED")
  # Document order: `strict` declares one order and builds hints in it; `reference` repeats the published procedure.
  order: Literal["strict", "reference"] = "strict"
  # `exact` recomputes each chunk's window; `cached` keeps keys and values of earlier chunks.
  method: Literal["exact", "cached"] = "exact"
  batch_size: int = _env(24, "TTT_BATCH_SIZE")
  seq_len: int = _env(3072, "TTT_EVAL_SEQ_LEN")
  chunk_size: int = _env(64, "TTT_CHUNK_SIZE")
  short_score_first: bool = _env(True, "TTT_SHORT_SCORE_FIRST_ENABLED")
  short_score_first_steps: str = _env("256:16,2000:32", "TTT_SHORT_SCORE_FIRST_STEPS")
  short_doc_len: int = _env(2000, "TTT_SHORT_DOC_LEN")
  short_chunk_size: int = _env(32, "TTT_SHORT_CHUNK_SIZE")
  short_lora: bool = _env(False, "TTT_SHORT_LORA_ENABLED")
  # Adapters of short documents; what is unset is as for the others.
  short_lora_rank: int | None = _env(None, "TTT_SHORT_LORA_RANK")
  short_lora_lr: float | None = _env(None, "TTT_SHORT_LORA_LR")
  short_weight_decay: float | None = _env(None, "TTT_SHORT_WEIGHT_DECAY")
  short_beta2: float | None = _env(None, "TTT_SHORT_BETA2")
  lora_rank: int = _env(80, "TTT_LORA_RANK")  # R
  lora_alpha: float = _env(144.0, "TTT_LORA_ALPHA")
  lora_lr: float = _env(1e-4, "TTT_LORA_LR")
  local_lr_mult: float = _env(0.75, "TTT_LOCAL_LR_MULT")
  weight_decay: float = _env(0.5, "TTT_WEIGHT_DECAY")
  beta1: float = _env(0.0, "TTT_BETA1")
  beta2: float = _env(0.99, "TTT_BETA2")
  grad_steps: int = _env(1, "TTT_GRAD_STEPS")
  optimizer: Literal["adam", "sgd"] = _env("adam", "TTT_OPTIMIZER")
  mask: Literal["", "all", "baseline_all", "no_q", "no_v", "no_qv"] = _env("no_qv", "TTT_MASK")
  q_lora: bool | None = _env(None, "TTT_Q_LORA")  # unset: as the mask says
  k_lora: bool = _env(True, "TTT_K_LORA")
  v_lora: bool | None = _env(None, "TTT_V_LORA")
  o_lora: bool = _env(True, "TTT_O_LORA")
  mlp_lora: bool = _env(True, "TTT_MLP_LORA")
  warm_start_a: bool = _env(True, "TTT_WARM_START_A")
  warm_start_mean: bool = _env(False, "TTT_WARM_START_MEAN_ENABLED")
  warm_start_mean_doc_len: int | None = _env(None, "TTT_WARM_START_MEAN_DOC_LEN")  # unset: short_doc_len
  warm_start_mean_momentum: float = _env(0.95, "TTT_WARM_START_MEAN_MOMENTUM")
  train_min_doc_len: int = _env(0, "TTT_TRAIN_MIN_DOC_LEN")
  train_max_doc_len: int = _env(0, "TTT_TRAIN_MAX_DOC_LEN")
  eval_batches: str = _env("", "TTT_EVAL_BATCHES")
  prefix_docs: int = _env(2500, "PHASED_TTT_PREFIX_DOCS")
  num_phases: int = _env(1, "PHASED_TTT_NUM_PHASES")
  global_lr: float = _env(0.001, "GLOBAL_TTT_LR")
  global_momentum: float = _env(0.9, "GLOBAL_TTT_MOMENTUM")
  global_epochs: int = _env(1, "GLOBAL_TTT_EPOCHS")
  global_chunk_tokens: int = _env(32768, "GLOBAL_TTT_CHUNK_TOKENS")
  global_batch_seqs: int = _env(32, "GLOBAL_TTT_BATCH_SEQS")
  global_grad_clip: float = _env(1.0, "GLOBAL_TTT_GRAD_CLIP")
  global_warmup_chunks: int = _env(0, "GLOBAL_TTT_WARMUP_CHUNKS")
  global_warmup_start_lr: float = _env(0.0, "GLOBAL_TTT_WARMUP_START_LR")
  global_respect_documents: bool = _env(True, "GLOBAL_TTT_RESPECT_DOC_BOUNDARIES")

  @property
  def adapts_q(self) -> bool:
    return self.mask not in ("no_q", "no_qv") if self.q_lora is None else self.q_lora

  @property
  def adapts_v(self) -> bool:
    return self.mask not in ("no_v", "no_qv") if self.v_lora is None else self.v_lora


@dataclasses.dataclass(frozen=True)
class HintConfig:
  enabled: bool = _env(True, "NGRAM_TILT_ENABLED")
  order: int = _env(16, "TOKEN_ORDER")  # context tokens + 1
  threshold: float = _env(0.8, "TOKEN_THRESHOLD")
  boost: float = _env(2.625, "TOKEN_BOOST")  # β, nats
  # `exact` compares contexts in full; `reference` uses the published hash keys, which may collide.
  table: Literal["exact", "reference"] = "exact"


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
  matrix_bits: int = _env(6, "MATRIX_BITS")
  embed_bits: int = _env(7, "EMBED_BITS")
  matrix_clip_sigmas: float = _env(12.85, "MATRIX_CLIP_SIGMAS")
  attn_clip_sigmas: float = _env(13.0, "ATTN_CLIP_SIGMAS")
  mlp_clip_sigmas: float = _env(11.5, "MLP_CLIP_SIGMAS")
  embed_clip_sigmas: float = _env(14.0, "EMBED_CLIP_SIGMAS")
  gate_int8: bool = _env(True, "GATED_ATTN_QUANT_GATE")
  calibration_batches: int = _env(16, "GPTQ_CALIBRATION_BATCHES")
  calibration_scope: Literal["rank0", "all"] = "rank0"
  calibration_respect_documents: bool = False
  reserve_seconds: float = _env(4.0, "GPTQ_RESERVE_SECONDS")  # of the training clock, kept for the Hessians
  damping: float = 0.01  # share of the mean diagonal that is added to every Hessian's diagonal
  block_size: int = 128
  awq: bool = _env(True, "AWQ_LITE_ENABLED")
  awq_bits: int = _env(8, "AWQ_LITE_BITS")
  awq_group_size: int = _env(64, "AWQ_LITE_GROUP_SIZE")
  awq_group_top_k: int = _env(1, "AWQ_LITE_GROUP_TOP_K")
  lqer: bool = _env(True, "LQER_ENABLED")
  lqer_rank: int = _env(4, "LQER_RANK")
  lqer_top_k: int = _env(3, "LQER_TOP_K")
  lqer_factor_bits: int = _env(4, "LQER_FACTOR_BITS")
  lqer_asym: bool = _env(True, "LQER_ASYM_ENABLED")
  lqer_asym_group: int = _env(64, "LQER_ASYM_GROUP")
  lqer_scope: Literal["all", "attn", "mlp", "embed"] = _env("all", "LQER_SCOPE")
  lqer_gain_select: bool = _env(False, "LQER_GAIN_SELECT")
  codec: Literal["entropy", "zstd"] = "entropy"
  budget_bytes: int = 16_000_000


@dataclasses.dataclass(frozen=True)
class Settings:
  """Everything that decides a run."""

  data: DataConfig = DataConfig()
  model: ModelConfig = ModelConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  train: TrainConfig = TrainConfig()
  eval: EvalConfig = EvalConfig()
  ttt: TTTConfig = TTTConfig()
  hints: HintConfig = HintConfig()
  quantize: QuantizeConfig = QuantizeConfig()
  seed: int = _env(1337, "SEED")

  @classmethod
  def from_env(cls, environ: Mapping[str, str], base: "Settings | None" = None) -> "Settings":
    """`base` with every known name in `environ` applied.

    Names that no setting has are left alone (an environment holds many); `check_env_names` refuses them where a
    mapping is meant to hold settings only. Raises UserError on a value of the wrong type or one not supported.
    """
    settings = base if base is not None else cls()
    changes: dict[str, dict[str, object]] = {}
    for section, field in _fields():
      name = field.metadata.get("env")
      if name and name in environ:
        value = parse_env(name, environ[name], _type_of(section, field))
        changes.setdefault(section, {})[field.name] = value
    refuse_unsupported(environ)
    return _replaced(settings, changes)

  @classmethod
  def from_toml(cls, path: str | Path) -> "Settings":
    """The config file at `path` over the defaults. Raises UserError naming the file and the key."""
    path = Path(path)
    try:
      table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
      near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1)
      hint = f"; did you mean {path.parent / near[0]}?" if near else "."
      raise UserError(f"There is no config file {path}{hint}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
      raise UserError(f"{path} is not valid TOML: {e}.") from None
    return cls.from_dict(table, where=str(path))

  @classmethod
  def from_dict(cls, table: Mapping[str, object], where: str = "config") -> "Settings":
    """Inverse of `to_dict`. Raises UserError on unknown names and wrong types, with the nearest valid name."""
    sections = {f.name: f for f in dataclasses.fields(cls)}
    changes: dict[str, dict[str, object]] = {}
    for section, value in table.items():
      if section not in sections:
        raise UserError(f"{where}: unknown section or setting {section!r}{nearest(section, sections)}")
      if not dataclasses.is_dataclass(sections[section].type):
        changes.setdefault("", {})[section] = checked(f"{where}: {section}", value, _type_of("", sections[section]))
        continue
      if not isinstance(value, Mapping):
        raise UserError(f"{where}: {section} is a section, so it needs [{section}] and names under it.")
      fields = {f.name: f for f in dataclasses.fields(sections[section].type)}
      for key, item in value.items():
        if key not in fields:
          raise UserError(f"{where}: unknown setting {section}.{key}{nearest(key, fields)}")
        item = checked(f"{where}: {section}.{key}", item, _type_of(section, fields[key]))
        changes.setdefault(section, {})[key] = item
    return _replaced(cls(), changes)

  def to_dict(self) -> dict[str, object]:
    """Nested plain values; unset optional settings are left out, as TOML has no null."""
    return {
      k: {kk: vv for kk, vv in v.items() if vv is not None} if isinstance(v, dict) else v
      for k, v in dataclasses.asdict(self).items()
    }


def load(path: str | Path, environ: Mapping[str, str] | None = None) -> Settings:
  """The config file with the environment over it."""
  return Settings.from_env(os.environ if environ is None else environ, base=Settings.from_toml(path))


def env_names() -> dict[str, str]:
  """Environment name → dotted setting name, for every setting that has one."""
  return {
    f.metadata["env"]: f"{section}.{f.name}" if section else f.name for section, f in _fields() if "env" in f.metadata
  }


def check_env_names(names: typing.Iterable[str]) -> None:
  """Raises UserError if a name is no setting's environment name, with the nearest one that is."""
  known = [*env_names(), *FIXED]
  for name in names:
    if name not in known:
      raise UserError(f"Unknown setting {name}{nearest(name, known)}")


def _fields():
  for top in dataclasses.fields(Settings):
    if dataclasses.is_dataclass(top.type):
      for field in dataclasses.fields(top.type):
        yield top.name, field
    else:
      yield "", top


def _type_of(section: str, field: dataclasses.Field):
  owner = Settings if not section else next(f.type for f in dataclasses.fields(Settings) if f.name == section)
  return typing.get_type_hints(owner)[field.name]


def _replaced(settings: Settings, changes: dict[str, dict[str, object]]) -> Settings:
  top = dict(changes.get("", {}))
  for section, values in changes.items():
    if section:
      top[section] = dataclasses.replace(getattr(settings, section), **values)
  return dataclasses.replace(settings, **top)

"""Every setting, in nested frozen dataclasses, with its environment name, its range and its meaning beside it.

The defaults are the values of the record run. `load.py` reads settings from files and environments, `check.py` refuses
combinations that cannot work, `arguments.py` reads them from a command line, `reference.py` lists them.
"""

import dataclasses
import importlib
import sys
import types
from typing import Literal

from pgolf_jax.settings.fields import (
  BITS,
  COUNT,
  DECAY,
  INDEX,
  LENGTH,
  NOT_NEGATIVE,
  POSITIVE,
  PROPER_SHARE,
  RATE,
  SHARE,
  WIDTH,
  ChunkStep,
  LengthStage,
  Range,
  ScaleStage,
  setting,
)
from pgolf_jax.settings.scoring import HintConfig, LoRAConfig, PhaseConfig, ShortConfig, TTTConfig

__all__ = [
  "ChunkStep",
  "DataConfig",
  "EvalConfig",
  "HintConfig",
  "LengthStage",
  "LoRAConfig",
  "ModelConfig",
  "OptimizerConfig",
  "PhaseConfig",
  "QuantizeConfig",
  "ScaleStage",
  "Settings",
  "ShortConfig",
  "TTTConfig",
  "TrainConfig",
]


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """The text."""

  path: str = setting(
    "default",
    "DATA_PATH",
    None,
    "folder of shards, byte sidecar and tokenizer; the word default means the built-in speeches",
  )
  tokenizer: str = setting("", "TOKENIZER_PATH", None, "SentencePiece model; empty: tokenizer.model in the data folder")
  caseops: bool = setting(
    True, "CASEOPS_ENABLED", None, "whether CaseOps rewrote the text, so that bytes come from the sidecar"
  )
  caseops_markers: Literal["published", "before-space"] = setting(
    "published", "CASEOPS_MARKERS", None,
    "published: CaseOps' marker of a capitalised word is behind the space in front of it; before-space: before it",
  )  # fmt: skip
  discard_prefetched: bool = setting(
    True, None, None, "whether a change of sequence length throws away two micro-batches, as in the reference"
  )

  @property
  def markers(self) -> Literal["none", "published", "before-space"]:
    """Where CaseOps put its markers, if it rewrote the text."""
    return self.caseops_markers if self.caseops else "none"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The architecture."""

  vocab_size: int = setting(8192, "VOCAB_SIZE", WIDTH, "tokens that there are")  # V; a shard's tokens have 16 bits
  num_layers: int = setting(11, "NUM_LAYERS", Range(1, 1000), "physical layers")  # L
  model_dim: int = setting(512, "MODEL_DIM", WIDTH, "width of the model")  # D
  num_heads: int = setting(8, "NUM_HEADS", WIDTH, "query heads")  # H
  num_kv_heads: int = setting(4, "NUM_KV_HEADS", WIDTH, "key and value heads")  # K
  mlp_mult: float = setting(4.0, "MLP_MULT", Range(0, 1000, above=True), "width of the MLP over the model's")  # F / D
  num_loops: int = setting(2, "NUM_LOOPS", Range(0, 100), "extra passes over the layers loop_start to loop_end")
  loop_start: int = setting(3, "LOOP_START", INDEX, "first looped layer, from 0")
  loop_end: int = setting(5, "LOOP_END", INDEX, "last looped layer")
  parallel_start_layer: int = setting(
    8, "PARALLEL_START_LAYER", INDEX, "first layer with two residual lanes; 0: one lane throughout"
  )
  parallel_final_lane: Literal["mean", "attn", "mlp"] = setting(
    "mean", "PARALLEL_FINAL_LANE", None, "what the two lanes become at the end: their mean, or one of them"
  )
  xsa_last_n: int = setting(11, "XSA_LAST_N", INDEX, "last layers whose heads drop their own value's direction")
  rope_dims: int = setting(16, "ROPE_DIMS", INDEX, "leading dimensions of a head that rotate; 0: all")
  rope_base: float = setting(10000.0, "ROPE_BASE", POSITIVE, "base of the rotary frequencies")
  qk_gain_init: float = setting(5.25, "QK_GAIN_INIT", Range(-1000, 1000), "first value of every head's query gain")
  leaky_relu_sq_slope: float = setting(
    0.3, "LEAKY_RELU_SQ_SLOPE", PROPER_SHARE, "slope of the MLP's activation below zero, before the square"
  )
  ln_scale: bool = setting(True, "LN_SCALE", None, "whether each norm is divided by √(layer + 1)")
  gate_window: int = setting(12, "GATE_WINDOW", WIDTH, "leading dimensions that gates read")
  smear_gate: bool = setting(
    True, "SMEAR_GATE_ENABLED", None, "whether each token's embedding is mixed with the one before it"
  )
  skip_gates: bool = setting(True, "SKIP_GATES_ENABLED", None, "whether the share of a skip that joins is learnt")
  sparse_attn_gate: bool = setting(
    True, "SPARSE_ATTN_GATE_ENABLED", None, "whether the weight of each head's output is learnt"
  )
  sparse_attn_gate_scale: float = setting(
    0.5, "SPARSE_ATTN_GATE_SCALE", Range(-1000, 1000), "factor on that gate's input"
  )
  sparse_attn_gate_init_std: float = setting(
    0.0, "SPARSE_ATTN_GATE_INIT_STD", RATE, "standard deviation of that gate's first weights"
  )
  value_residual: bool = setting(
    False, "VALUE_RESIDUAL", None, "whether the first layer's values are mixed into those of all later layers"
  )
  dense_skips: int = setting(
    0, "DENSE_SKIPS", INDEX,
    "layers whose outputs join the embedding's in a sum before the last norm, weighted by token; 0: no sum",
  )  # fmt: skip
  logit_softcap: float = setting(30.0, "LOGIT_SOFTCAP", POSITIVE, "cap c of the logits z in training: c·tanh(z/c)")
  asym_logit_rescale: bool = setting(
    True, "ASYM_LOGIT_RESCALE", None, "whether evaluation has caps of its own for z > 0 and z ≤ 0"
  )
  tied_embed_init_std: float = setting(
    0.005, "TIED_EMBED_INIT_STD", RATE, "standard deviation of the embedding's first values"
  )
  bos_id: int = setting(1, None, INDEX, "token that begins a document")

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

  @property
  def dense_sources(self) -> tuple[int, ...]:
    """The layers whose outputs the dense skips take, evenly among all but the last."""
    return tuple((2 * i + 1) * (self.num_layers - 1) // (2 * self.dense_skips) for i in range(self.dense_skips))

  def layer_order(self, looping: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns (encoder, decoder): physical layers in the order in which they run. Recipe section 2."""
    layers = list(range(self.num_layers))
    if looping and self.num_loops > 0:
      loop = layers[self.loop_start : self.loop_end + 1]
      layers = layers[: self.loop_start] + loop * (self.num_loops + 1) + layers[self.loop_end + 1 :]
    cut = len(layers) // 2
    return tuple(layers[:cut]), tuple(layers[cut:])


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Muon for the banks of matrices, AdamW for the rest."""

  matrix_lr: float = setting(0.026, "MATRIX_LR", RATE, "learning rate of the matrices (Muon)")
  muon_wd: float = setting(0.095, "MUON_WD", RATE, "weight decay of the matrices")
  muon_momentum: float = setting(0.97, "MUON_MOMENTUM", SHARE, "Muon's momentum μ after its warm-up")
  muon_momentum_warmup_start: float = setting(0.92, "MUON_MOMENTUM_WARMUP_START", SHARE, "μ at the first step")
  muon_momentum_warmup_steps: int = setting(1500, "MUON_MOMENTUM_WARMUP_STEPS", INDEX, "steps over which μ changes")
  muon_steps: int = setting(5, "MUON_BACKEND_STEPS", INDEX, "polar-express steps, 0 to 5; more count as 5")
  muon_row_normalize: bool = setting(True, "MUON_ROW_NORMALIZE", None, "whether each row is divided by its norm first")
  muon_column_normalize: bool = setting(
    False, "MUON_COLUMN_NORMALIZE", None, "whether each column is divided by its norm, after the rows"
  )
  muon_heads: int = setting(
    0, "MUON_HEADS", Range(0, 2**16), "heads that are orthogonalised together; 0: all rows of a matrix"
  )
  muon_heads_of: Literal["q", "k", "v", "qk", "kv", "qkv"] = setting(
    "qk", "MUON_HEADS_OF", None, "whose heads: those of queries, keys or values; all other matrices stay whole"
  )
  muon_dtype: Literal["bfloat16", "float32"] = setting("bfloat16", None, None, "type of momentum and orthogonalisation")
  embed_lr: float = setting(0.03, "TIED_EMBED_LR", RATE, "learning rate of the embedding")
  embed_wd: float = setting(0.085, "EMBED_WD", RATE, "weight decay of the embedding")
  scalar_lr: float = setting(
    0.02, "SCALAR_LR", RATE, "learning rate of everything that is neither matrix nor embedding"
  )
  adam_wd: float = setting(0.02, "ADAM_WD", RATE, "weight decay of everything that is neither matrix nor embedding")
  beta1: float = setting(0.9, "BETA1", DECAY, "AdamW's decay of the first moment")
  beta2: float = setting(0.99, "BETA2", DECAY, "AdamW's decay of the second moment")
  adam_eps: float = setting(1e-8, "ADAM_EPS", SHARE, "AdamW's epsilon")
  grad_clip_norm: float = setting(0.3, "GRAD_CLIP_NORM", NOT_NEGATIVE, "largest norm of a gradient; 0: no limit")
  clip_scope: Literal["rank", "global"] = setting(
    "rank", None, None, "rank clips each rank's gradient before the average, as the reference does; global the average"
  )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """A training run: its length, its batches and its schedules."""

  iterations: int = setting(20000, "ITERATIONS", INDEX, "most steps")
  max_wallclock_seconds: float = setting(
    600.0, "MAX_WALLCLOCK_SECONDS", NOT_NEGATIVE, "most seconds of training; 0: no limit, steps alone"
  )
  batch_tokens: int = setting(786432, "TRAIN_BATCH_TOKENS", LENGTH, "tokens of a step, over all ranks")
  micro_batches: int = setting(
    8, None, COUNT, "packed rows that a step's tokens are cut into, over all ranks; more take less memory"
  )
  world_size: int = setting(0, "WORLD_SIZE", Range(0, 2**20), "ranks that share out the stream; 0: one for each device")
  seq_len: int = setting(3072, "TRAIN_SEQ_LEN", LENGTH, "longest segment where there is no schedule, in tokens")
  seq_schedule: tuple[LengthStage, ...] = setting(
    (LengthStage(1024, 0.1), LengthStage(2048, 0.7), LengthStage(3072, 1.0)), "TRAIN_SEQ_SCHEDULE",
    (LENGTH, PROPER_SHARE), "longest segment by progress: each length until its share of the run",
  )  # fmt: skip
  schedule_mode: Literal["wallclock", "step"] = setting(
    "wallclock", "TRAIN_SEQ_SCHEDULE_MODE", None, "whether progress is measured by the clock or by steps"
  )
  seq_change_warmup_steps: int = setting(
    32, "SEQ_CHANGE_WARMUP_STEPS", INDEX, "steps over which the learning rate rises again after a change of length"
  )
  enable_looping_at: float = setting(
    0.35, "ENABLE_LOOPING_AT", RATE, "progress at which looping begins; 1 or more: never in training"
  )
  warmdown_frac: float = setting(0.85, "WARMDOWN_FRAC", SHARE, "share of the run over which the learning rate falls")
  warmdown_iters: int = setting(0, "WARMDOWN_ITERS", INDEX, "the same in steps; 0: by warmdown_frac")
  min_lr: float = setting(0.1, "MIN_LR", SHARE, "least factor on the learning rate, which the fall comes to")
  midrun_cap_schedule: tuple[ScaleStage, ...] = setting(
    (), "MIDRUN_CAP_SCHEDULE", (RATE, SHARE), "further factors on every learning rate, each from its share of the run"
  )
  ema_decay: float = setting(0.9965, "EMA_DECAY", DECAY, "decay of the averaged weights, per step")
  average_share: float = setting(
    1.0,
    "AVERAGE_SHARE",
    SHARE,
    "share of the average in the weights that training gives; the last step's have the rest",
  )
  warmup_steps: int = setting(
    20, "WARMUP_STEPS", INDEX, "steps in each looping mode before the clock starts, which are then undone"
  )
  compute_dtype: Literal["bfloat16", "float32"] = setting(
    "bfloat16", None, None, "type of the computation; weights are float32"
  )
  log_every: int = setting(500, "TRAIN_LOG_EVERY", INDEX, "steps between two log lines; 0: none after the first five")
  val_loss_every: int = setting(
    0, "VAL_LOSS_EVERY", INDEX, "steps between two plain scores, while the clock stands; 0: none"
  )
  stop_step: int = setting(0, "FORCE_STOP_STEP", INDEX, "stop after this many steps; 0: do not")
  checkpoint_every_seconds: float = setting(120.0, None, NOT_NEGATIVE, "seconds between two checkpoints")
  checkpoint_every_steps: int = setting(0, None, INDEX, "steps between two checkpoints; 0: by time alone")

  @property
  def length_stages(self) -> tuple[LengthStage, ...]:
    """The sequence-length schedule as it is run: at least one stage, the last one until progress 1."""
    stages = self.seq_schedule or (LengthStage(self.seq_len, 1.0),)
    return stages if stages[-1].until >= 1.0 else (*stages, LengthStage(stages[-1].seq_len, 1.0))

  @property
  def scale_stages(self) -> tuple[ScaleStage, ...]:
    """The schedule of further factors as it is run: at least one stage, the first one from progress 0."""
    stages = self.midrun_cap_schedule or (ScaleStage(1.0, 0.0),)
    return stages if stages[0].at <= 0 else (ScaleStage(stages[0].scale, 0.0), *stages)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Scoring of the validation documents."""

  batch_tokens: int = setting(524288, "VAL_BATCH_TOKENS", LENGTH, "tokens in flight in plain scoring, over all ranks")
  micro_batches: int = setting(
    8, None, COUNT, "spans that these tokens are cut into; in the reference ranks times accumulation, always 8"
  )
  seq_len: int = setting(3072, "EVAL_SEQ_LEN", LENGTH, "longest segment of plain scoring, in tokens")
  doc_fraction: float = setting(
    1.0, "VAL_DOC_FRACTION", PROPER_SHARE, "share of the validation documents that test-time training scores"
  )


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
  """How averaged weights become an artifact."""

  method: Literal["gptq", "rate"] = setting(
    "gptq", None, None,
    "gptq: grids of few bits with clips, as in the record; rate: steps where the loss says, priced by entropy",
  )  # fmt: skip
  trellis: bool = setting(
    True, None, None, "rate: whether values lie on two grids at half their spacing: a tenth of a bit less at equal loss"
  )
  step: float = setting(
    0.00015, None, POSITIVE, "rate: what all steps are multiples of; half of it takes about one bit more a weight"
  )
  tune_steps: int = setting(
    0,
    None,
    INDEX,
    "rate: steps in which the weights not yet rounded learn to make up for the rounded, after each stage",
  )
  matrix_bits: int = setting(6, "MATRIX_BITS", BITS, "bits of the matrices")
  embed_bits: int = setting(7, "EMBED_BITS", BITS, "bits of the embedding")
  matrix_clip_sigmas: float = setting(
    12.85, "MATRIX_CLIP_SIGMAS", POSITIVE,
    "largest value kept of matrices that are neither attention nor MLP, in standard deviations of a row",
  )  # fmt: skip
  attn_clip_sigmas: float = setting(13.0, "ATTN_CLIP_SIGMAS", POSITIVE, "largest value kept of attention's matrices")
  mlp_clip_sigmas: float = setting(11.5, "MLP_CLIP_SIGMAS", POSITIVE, "largest value kept of the MLP's matrices")
  embed_clip_sigmas: float = setting(14.0, "EMBED_CLIP_SIGMAS", POSITIVE, "largest value kept of the embedding")
  fp16_up_to: int = setting(
    65_536, None, INDEX, "elements of the largest matrix that stays fp16; larger ones go through GPTQ"
  )
  gate_int8: bool = setting(True, "GATED_ATTN_QUANT_GATE", None, "whether attention gates are stored in 8 bits")
  calibration_batches: int = setting(16, "GPTQ_CALIBRATION_BATCHES", COUNT, "batches that the Hessians are taken from")
  calibration_micro_batches: int = setting(
    8, None, COUNT, "train.batch_tokens divided by this is a calibration batch; in the reference always 8"
  )
  calibration_scope: Literal["rank0", "all"] = setting(
    "rank0", None, None, "whether calibration reads the first rank's text or all of it"
  )
  calibration_respect_documents: bool = setting(
    False, None, None, "whether attention stays within documents in calibration"
  )
  reserve_seconds: float = setting(
    4.0, "GPTQ_RESERVE_SECONDS", NOT_NEGATIVE, "seconds of the training clock that are kept for the Hessians"
  )
  damping: float = setting(
    0.01, None, RATE, "share of the mean diagonal that is added to the diagonal of every Hessian"
  )
  block_size: int = setting(128, None, COUNT, "columns whose errors are passed on together")
  awq: bool = setting(True, "AWQ_LITE_ENABLED", None, "whether the most important columns get more bits")
  awq_bits: int = setting(8, "AWQ_LITE_BITS", BITS, "bits of these columns")
  awq_group_size: int = setting(64, "AWQ_LITE_GROUP_SIZE", COUNT, "columns of a group")
  awq_group_top_k: int = setting(1, "AWQ_LITE_GROUP_TOP_K", INDEX, "groups that get more bits, in the whole model")
  lqer: bool = setting(True, "LQER_ENABLED", None, "whether the worst matrices are corrected by low-rank factors")
  lqer_rank: int = setting(4, "LQER_RANK", Range(1, 64), "rank of the factors")
  lqer_top_k: int = setting(3, "LQER_TOP_K", INDEX, "matrices that get factors")
  lqer_factor_bits: int = setting(4, "LQER_FACTOR_BITS", BITS, "bits of factors that are not asymmetric")
  lqer_asym: bool = setting(
    True, "LQER_ASYM_ENABLED", None, "whether factors are asymmetric: A in 2 bits, and B in 4 by groups"
  )
  lqer_asym_group: int = setting(64, "LQER_ASYM_GROUP", COUNT, "values of B that share a step")
  lqer_scope: Literal["all", "attn", "mlp", "embed"] = setting(
    "all", "LQER_SCOPE", None, "matrices that may get factors"
  )
  lqer_gain_select: bool = setting(
    False, "LQER_GAIN_SELECT", None, "whether matrices are chosen by the error that factors remove, not by their error"
  )
  codec: Literal["entropy", "zstd"] = setting("entropy", None, None, "how the artifact's streams are coded")
  embed_tokenizer: Literal["small", "always", "never"] = setting(
    "small", None, None,
    "whether the tokenizer travels in the artifact, where its bytes count; small: if it takes at most 16 KiB",
  )  # fmt: skip
  budget_bytes: int = setting(16_000_000, None, INDEX, "most bytes of artifact and code")
  fill_budget: bool = setting(
    False, None, None, "whether a run searches for the finest clips, or the finest step, that fit the budget"
  )


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
  seed: int = setting(
    1337, "SEED", Range(0, 2**63 - 1), "seed of the initial weights, adapters, calibration and samples"
  )


class _Callable(types.ModuleType):
  """This module as the function `pgolf_jax.settings(config, **overrides)`, which the package offers under its name."""

  def __call__(self, *config, **overrides) -> Settings:
    return importlib.import_module("pgolf_jax.settings.builtin").settings(*config, **overrides)


sys.modules[__name__].__class__ = _Callable

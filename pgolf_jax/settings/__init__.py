"""Every setting, in nested frozen dataclasses; each knows the environment name under which the recipe's users know it.

The defaults are the values of the record run. `load.py` reads settings from files and environments, `check.py` refuses
combinations that cannot work.
"""

import dataclasses
import importlib
import sys
import types
from typing import Literal, NamedTuple


def _env(default, name: str, flat: str | None = None):
  """A field that the environment variable `name` sets too.

  Args:
    flat: the name that the field had directly under its top section, before sections were nested; files may use it.
  """
  return dataclasses.field(default=default, metadata={"env": name} | ({"flat": flat} if flat else {}))


class LengthStage(NamedTuple):
  """A stage of the sequence-length schedule, written `1024@0.1`."""

  seq_len: int  # tokens
  until: float  # last progress of the stage, in (0, 1]


class ScaleStage(NamedTuple):
  """A stage of a schedule of factors, written `0.5@0.9`."""

  scale: float
  at: float  # first progress of the stage


class ChunkStep(NamedTuple):
  """The chunk size for documents up to a length, written `256:16`."""

  longest: int  # tokens of the longest document of a batch, both bos counted
  size: int  # targets of a chunk


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
  vocab_size: int = _env(8192, "VOCAB_SIZE")  # V, tokens
  num_layers: int = _env(11, "NUM_LAYERS")  # L, physical layers
  model_dim: int = _env(512, "MODEL_DIM")  # D, width
  num_heads: int = _env(8, "NUM_HEADS")  # H, query heads
  num_kv_heads: int = _env(4, "NUM_KV_HEADS")  # K, key and value heads
  mlp_mult: float = _env(4.0, "MLP_MULT")  # F / D, width of the MLP over the model's
  num_loops: int = _env(2, "NUM_LOOPS")  # extra passes over layers loop_start … loop_end
  loop_start: int = _env(3, "LOOP_START")  # first looped layer, from 0
  loop_end: int = _env(5, "LOOP_END")  # last looped layer
  parallel_start_layer: int = _env(8, "PARALLEL_START_LAYER")  # first layer with two residual lanes; 0: none
  # What the two lanes become at the end: their mean, or one of them.
  parallel_final_lane: Literal["mean", "attn", "mlp"] = _env("mean", "PARALLEL_FINAL_LANE")
  xsa_last_n: int = _env(11, "XSA_LAST_N")  # last layers whose heads drop their own value's direction
  rope_dims: int = _env(16, "ROPE_DIMS")  # leading dimensions of a head that rotate; 0: all
  rope_base: float = _env(10000.0, "ROPE_BASE")  # base of the rotary frequencies
  qk_gain_init: float = _env(5.25, "QK_GAIN_INIT")  # first value of every head's query gain
  # Slope of the MLP's activation below zero, before the square.
  leaky_relu_sq_slope: float = _env(0.3, "LEAKY_RELU_SQ_SLOPE")
  ln_scale: bool = _env(True, "LN_SCALE")  # divide each norm by √(layer + 1)
  gate_window: int = _env(12, "GATE_WINDOW")  # leading dimensions that gates read
  smear_gate: bool = _env(True, "SMEAR_GATE_ENABLED")  # mix each token's embedding with the one before it
  skip_gates: bool = _env(True, "SKIP_GATES_ENABLED")  # learn how much of a skip joins
  sparse_attn_gate: bool = _env(True, "SPARSE_ATTN_GATE_ENABLED")  # learn how much of each head's output counts
  sparse_attn_gate_scale: float = _env(0.5, "SPARSE_ATTN_GATE_SCALE")  # factor on that gate's input
  # Standard deviation of that gate's first weights.
  sparse_attn_gate_init_std: float = _env(0.0, "SPARSE_ATTN_GATE_INIT_STD")
  logit_softcap: float = _env(30.0, "LOGIT_SOFTCAP")  # cap c of the logits, c·tanh(z/c), in training
  asym_logit_rescale: bool = _env(True, "ASYM_LOGIT_RESCALE")  # evaluation caps of their own for z > 0 and z ≤ 0
  tied_embed_init_std: float = _env(0.005, "TIED_EMBED_INIT_STD")  # standard deviation of the embedding's first values
  bos_id: int = 1  # token that begins a document

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
  matrix_lr: float = _env(0.026, "MATRIX_LR")  # Muon's learning rate
  muon_wd: float = _env(0.095, "MUON_WD")  # Muon's weight decay
  muon_momentum: float = _env(0.97, "MUON_MOMENTUM")  # μ after its warm-up
  muon_momentum_warmup_start: float = _env(0.92, "MUON_MOMENTUM_WARMUP_START")  # μ at the first step
  muon_momentum_warmup_steps: int = _env(1500, "MUON_MOMENTUM_WARMUP_STEPS")  # steps over which μ rises
  muon_steps: int = _env(5, "MUON_BACKEND_STEPS")  # polar-express steps, 0 to 5; more count as 5
  muon_row_normalize: bool = _env(True, "MUON_ROW_NORMALIZE")  # divide each row by its norm first
  muon_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # type of momentum and orthogonalisation
  embed_lr: float = _env(0.03, "TIED_EMBED_LR")  # learning rate of the embedding
  embed_wd: float = _env(0.085, "EMBED_WD")  # its weight decay
  scalar_lr: float = _env(0.02, "SCALAR_LR")  # learning rate of everything that is neither matrix nor embedding
  adam_wd: float = _env(0.02, "ADAM_WD")  # its weight decay
  beta1: float = _env(0.9, "BETA1")  # AdamW's decay of the first moment
  beta2: float = _env(0.99, "BETA2")  # AdamW's decay of the second moment
  adam_eps: float = _env(1e-8, "ADAM_EPS")  # AdamW's epsilon
  grad_clip_norm: float = _env(0.3, "GRAD_CLIP_NORM")  # largest norm of a gradient; 0: no limit
  # Clip each rank's gradient before the average, as the reference does, or the averaged gradient.
  clip_scope: Literal["rank", "global"] = "rank"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  iterations: int = _env(20000, "ITERATIONS")  # most steps
  max_wallclock_seconds: float = _env(600.0, "MAX_WALLCLOCK_SECONDS")  # 0: no cap, steps alone
  batch_tokens: int = _env(786432, "TRAIN_BATCH_TOKENS")  # tokens of a step, over all ranks
  micro_batches: int = 8  # packed rows that a step's tokens are cut into, over all ranks; more take less memory
  world_size: int = _env(0, "WORLD_SIZE")  # ranks that share out the stream; 0: one per device
  seq_len: int = _env(3072, "TRAIN_SEQ_LEN")  # longest segment where there is no schedule
  # Longest segment by progress.
  seq_schedule: tuple[LengthStage, ...] = _env(
    (LengthStage(1024, 0.1), LengthStage(2048, 0.7), LengthStage(3072, 1.0)), "TRAIN_SEQ_SCHEDULE"
  )
  # Progress by the clock, or by steps.
  schedule_mode: Literal["wallclock", "step"] = _env("wallclock", "TRAIN_SEQ_SCHEDULE_MODE")
  # Steps over which the learning rate rises again after a change of length.
  seq_change_warmup_steps: int = _env(32, "SEQ_CHANGE_WARMUP_STEPS")
  enable_looping_at: float = _env(0.35, "ENABLE_LOOPING_AT")  # progress at which looping begins
  warmdown_frac: float = _env(0.85, "WARMDOWN_FRAC")  # share of the run over which the learning rate falls
  warmdown_iters: int = _env(0, "WARMDOWN_ITERS")  # the same in steps; 0: by warmdown_frac
  min_lr: float = _env(0.1, "MIN_LR")  # least factor that the warm-down comes to
  midrun_cap_schedule: tuple[ScaleStage, ...] = _env((), "MIDRUN_CAP_SCHEDULE")  # further factors on every lr
  ema_decay: float = _env(0.9965, "EMA_DECAY")  # decay of the averaged weights, per step
  warmup_steps: int = _env(20, "WARMUP_STEPS")  # run in each looping mode before the clock starts, then undone
  compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # type of the computation; weights are float32
  log_every: int = _env(500, "TRAIN_LOG_EVERY")  # steps between two log lines; 0: none after the first five
  val_loss_every: int = _env(0, "VAL_LOSS_EVERY")  # steps between two plain scores, the clock stopped; 0: none
  stop_step: int = _env(0, "FORCE_STOP_STEP")  # stop after this many steps; 0: do not
  checkpoint_every_seconds: float = 120.0  # seconds between two checkpoints
  checkpoint_every_steps: int = 0  # 0: by time alone

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
  batch_tokens: int = _env(524288, "VAL_BATCH_TOKENS")  # tokens in flight, over all ranks
  # Spans that batch_tokens is cut into: the reference's ranks times its accumulation, which is always 8.
  micro_batches: int = 8
  seq_len: int = _env(3072, "EVAL_SEQ_LEN")  # longest segment of plain scoring, tokens
  doc_fraction: float = _env(1.0, "VAL_DOC_FRACTION")  # share of the validation documents that TTT scores


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
  """The adapters of a document, and how they learn."""

  rank: int = _env(80, "TTT_LORA_RANK", "lora_rank")  # R, rank
  alpha: float = _env(144.0, "TTT_LORA_ALPHA", "lora_alpha")  # what adapters add is multiplied by alpha / rank
  lr: float = _env(1e-4, "TTT_LORA_LR", "lora_lr")  # learning rate
  lr_mult: float = _env(0.75, "TTT_LOCAL_LR_MULT", "local_lr_mult")  # a further factor on every adapter's lr
  weight_decay: float = _env(0.5, "TTT_WEIGHT_DECAY", "weight_decay")  # decoupled in Adam, added to the gradient in SGD
  beta1: float = _env(0.0, "TTT_BETA1", "beta1")  # Adam's decay of the first moment; SGD: the momentum
  beta2: float = _env(0.99, "TTT_BETA2", "beta2")  # Adam's decay of the second moment
  grad_steps: int = _env(1, "TTT_GRAD_STEPS", "grad_steps")  # updates after each chunk
  optimizer: Literal["adam", "sgd"] = _env("adam", "TTT_OPTIMIZER", "optimizer")  # how adapters move
  # Which of queries and values have no adapter.
  mask: Literal["", "all", "baseline_all", "no_q", "no_v", "no_qv"] = _env("no_qv", "TTT_MASK", "mask")
  q: bool | None = _env(None, "TTT_Q_LORA", "q_lora")  # unset: as the mask says
  k: bool = _env(True, "TTT_K_LORA", "k_lora")  # keys have an adapter
  v: bool | None = _env(None, "TTT_V_LORA", "v_lora")  # unset: as the mask says
  o: bool = _env(True, "TTT_O_LORA", "o_lora")  # attention outputs have one
  mlp: bool = _env(True, "TTT_MLP_LORA", "mlp_lora")  # MLPs have one
  warm_start_a: bool = _env(True, "TTT_WARM_START_A", "warm_start_a")  # a batch starts with A of the batch before
  # Start short documents from the mean of earlier batches' adapters.
  warm_start_mean: bool = _env(False, "TTT_WARM_START_MEAN_ENABLED", "warm_start_mean")
  # Longest document that starts from the mean, tokens; unset: short.doc_len.
  warm_start_mean_doc_len: int | None = _env(None, "TTT_WARM_START_MEAN_DOC_LEN", "warm_start_mean_doc_len")
  # Weight of earlier batches in that mean.
  warm_start_mean_momentum: float = _env(0.95, "TTT_WARM_START_MEAN_MOMENTUM", "warm_start_mean_momentum")
  train_min_doc_len: int = _env(0, "TTT_TRAIN_MIN_DOC_LEN", "train_min_doc_len")  # shorter documents are only scored
  train_max_doc_len: int = _env(0, "TTT_TRAIN_MAX_DOC_LEN", "train_max_doc_len")  # longer ones too; 0: no limit

  @property
  def adapts_q(self) -> bool:
    """Whether queries have an adapter."""
    return self.mask not in ("no_q", "no_qv") if self.q is None else self.q

  @property
  def adapts_v(self) -> bool:
    """Whether values have an adapter."""
    return self.mask not in ("no_v", "no_qv") if self.v is None else self.v


@dataclasses.dataclass(frozen=True)
class ShortConfig:
  """What short documents have apart from the others."""

  doc_len: int = _env(2000, "TTT_SHORT_DOC_LEN", "short_doc_len")  # tokens of the longest short document
  score_first: bool = _env(True, "TTT_SHORT_SCORE_FIRST_ENABLED", "short_score_first")  # smaller chunks
  # Chunk sizes by document length.
  score_first_steps: tuple[ChunkStep, ...] = _env(
    (ChunkStep(256, 16), ChunkStep(2000, 32)), "TTT_SHORT_SCORE_FIRST_STEPS", "short_score_first_steps"
  )
  chunk_size: int = _env(32, "TTT_SHORT_CHUNK_SIZE", "short_chunk_size")  # where there are no score_first_steps
  lora: bool = _env(False, "TTT_SHORT_LORA_ENABLED", "short_lora")  # adapters apart, with what follows
  rank: int | None = _env(None, "TTT_SHORT_LORA_RANK", "short_lora_rank")  # unset, here and below: as for the others
  lr: float | None = _env(None, "TTT_SHORT_LORA_LR", "short_lora_lr")  # learning rate
  weight_decay: float | None = _env(None, "TTT_SHORT_WEIGHT_DECAY", "short_weight_decay")  # weight decay
  beta2: float | None = _env(None, "TTT_SHORT_BETA2", "short_beta2")  # Adam's decay of the second moment


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
  """Global phases: all weights learn from documents that are scored."""

  prefix_docs: int = _env(2500, "PHASED_TTT_PREFIX_DOCS", "prefix_docs")  # scored before the last phase; 0: no phase
  count: int = _env(1, "PHASED_TTT_NUM_PHASES", "num_phases")  # phases, spread evenly over prefix_docs
  lr: float = _env(0.001, "GLOBAL_TTT_LR", "global_lr")  # SGD's first learning rate; it falls as a cosine
  momentum: float = _env(0.9, "GLOBAL_TTT_MOMENTUM", "global_momentum")  # SGD's momentum
  epochs: int = _env(1, "GLOBAL_TTT_EPOCHS", "global_epochs")  # passes over the scored documents
  # Tokens of a chunk of the joined documents.
  chunk_tokens: int = _env(32768, "GLOBAL_TTT_CHUNK_TOKENS", "global_chunk_tokens")
  batch_seqs: int = _env(32, "GLOBAL_TTT_BATCH_SEQS", "global_batch_seqs")  # rows of an update, at most
  grad_clip: float = _env(1.0, "GLOBAL_TTT_GRAD_CLIP", "global_grad_clip")  # largest norm of a gradient; 0: no limit
  # Chunks over which the learning rate rises first.
  warmup_chunks: int = _env(0, "GLOBAL_TTT_WARMUP_CHUNKS", "global_warmup_chunks")
  # Learning rate at their beginning.
  warmup_start_lr: float = _env(0.0, "GLOBAL_TTT_WARMUP_START_LR", "global_warmup_start_lr")
  # Attention stays within documents.
  respect_documents: bool = _env(True, "GLOBAL_TTT_RESPECT_DOC_BOUNDARIES", "global_respect_documents")


@dataclasses.dataclass(frozen=True)
class TTTConfig:
  """Score-first test-time training."""

  enabled: bool = _env(True, "TTT_ENABLED")  # score with test-time training, then audit
  # Document order: `strict` declares one order and builds hints in it; `reference` repeats the published procedure.
  order: Literal["strict", "reference"] = "strict"
  # `exact` recomputes each chunk's window; `cached` keeps keys and values of earlier chunks.
  method: Literal["exact", "cached"] = "exact"
  batch_size: int = _env(24, "TTT_BATCH_SIZE")  # documents whose adapters move in step
  seq_len: int = _env(3072, "TTT_EVAL_SEQ_LEN")  # tokens of the longest window
  chunk_size: int = _env(64, "TTT_CHUNK_SIZE")  # targets between two updates
  # Batches after which the running score is logged, from 1, shortest documents first; empty: longest first.
  eval_batches: tuple[int, ...] = _env((), "TTT_EVAL_BATCHES")

  lora: LoRAConfig = LoRAConfig()
  short: ShortConfig = ShortConfig()
  phase: PhaseConfig = PhaseConfig()


@dataclasses.dataclass(frozen=True)
class HintConfig:
  enabled: bool = _env(True, "NGRAM_TILT_ENABLED")  # tilt distributions towards n-gram hints
  order: int = _env(16, "TOKEN_ORDER")  # context tokens + 1
  threshold: float = _env(0.8, "TOKEN_THRESHOLD")  # least share of a context's continuations that makes a hint
  boost: float = _env(2.625, "TOKEN_BOOST")  # β, nats
  # `exact` compares contexts in full; `reference` uses the published hash keys, which may collide.
  table: Literal["exact", "reference"] = "exact"


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
  matrix_bits: int = _env(6, "MATRIX_BITS")  # bits of the matrices
  embed_bits: int = _env(7, "EMBED_BITS")  # bits of the embedding
  # Largest value kept, in standard deviations of a row: other matrices.
  matrix_clip_sigmas: float = _env(12.85, "MATRIX_CLIP_SIGMAS")
  attn_clip_sigmas: float = _env(13.0, "ATTN_CLIP_SIGMAS")  # the same of attention
  mlp_clip_sigmas: float = _env(11.5, "MLP_CLIP_SIGMAS")  # the same of the MLP
  embed_clip_sigmas: float = _env(14.0, "EMBED_CLIP_SIGMAS")  # the same of the embedding
  gate_int8: bool = _env(True, "GATED_ATTN_QUANT_GATE")  # store attention gates in 8 bits
  calibration_batches: int = _env(16, "GPTQ_CALIBRATION_BATCHES")  # batches that the Hessians are taken from
  # A batch has train.batch_tokens divided by this: the reference's ranks times its accumulation, which is always 8.
  calibration_micro_batches: int = 8
  calibration_scope: Literal["rank0", "all"] = "rank0"  # the first rank's text, or all of it
  calibration_respect_documents: bool = False  # attention stays within documents in calibration
  reserve_seconds: float = _env(4.0, "GPTQ_RESERVE_SECONDS")  # of the training clock, kept for the Hessians
  damping: float = 0.01  # share of the mean diagonal that is added to every Hessian's diagonal
  block_size: int = 128  # columns whose errors are passed on together
  awq: bool = _env(True, "AWQ_LITE_ENABLED")  # give the most important columns more bits
  awq_bits: int = _env(8, "AWQ_LITE_BITS")  # bits of these columns
  awq_group_size: int = _env(64, "AWQ_LITE_GROUP_SIZE")  # columns of a group
  awq_group_top_k: int = _env(1, "AWQ_LITE_GROUP_TOP_K")  # groups that get them, in the whole model
  lqer: bool = _env(True, "LQER_ENABLED")  # correct the worst matrices by low-rank factors
  lqer_rank: int = _env(4, "LQER_RANK")  # rank of the factors
  lqer_top_k: int = _env(3, "LQER_TOP_K")  # matrices that get them
  lqer_factor_bits: int = _env(4, "LQER_FACTOR_BITS")  # bits of factors that are not asymmetric
  lqer_asym: bool = _env(True, "LQER_ASYM_ENABLED")  # A in 2 bits and B in 4 by groups
  lqer_asym_group: int = _env(64, "LQER_ASYM_GROUP")  # values of B that share a step
  lqer_scope: Literal["all", "attn", "mlp", "embed"] = _env("all", "LQER_SCOPE")  # matrices that may get factors
  lqer_gain_select: bool = _env(False, "LQER_GAIN_SELECT")  # choose by error removed, not by error
  codec: Literal["entropy", "zstd"] = "entropy"  # how the artifact's streams are coded
  budget_bytes: int = 16_000_000  # most bytes of artifact and code


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
  seed: int = _env(1337, "SEED")  # of initial weights, adapters, calibration and samples


class _Callable(types.ModuleType):
  """This module as the function `pgolf_jax.settings(config, **overrides)`, which the package offers under its name."""

  def __call__(self, *config, **overrides) -> Settings:
    return importlib.import_module("pgolf_jax.settings.builtin").settings(*config, **overrides)


sys.modules[__name__].__class__ = _Callable

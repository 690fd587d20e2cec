"""The settings of test-time training and of n-gram hints."""

import dataclasses
from typing import Literal

from pgolf_jax.settings.fields import (
  COUNT,
  DECAY,
  INDEX,
  LENGTH,
  NOT_NEGATIVE,
  RATE,
  SHARE,
  WIDTH,
  ChunkStep,
  Range,
  setting,
)


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
  """The adapters of a document, and how they learn."""

  rank: int = setting(80, "TTT_LORA_RANK", WIDTH, "rank of the adapters", "lora_rank")  # R
  alpha: float = setting(
    144.0, "TTT_LORA_ALPHA", NOT_NEGATIVE, "what the adapters add is multiplied by alpha / rank", "lora_alpha"
  )
  lr: float = setting(1e-4, "TTT_LORA_LR", RATE, "learning rate of the adapters", "lora_lr")
  lr_mult: float = setting(
    0.75, "TTT_LOCAL_LR_MULT", RATE, "a further factor on the learning rate of every adapter", "local_lr_mult"
  )
  weight_decay: float = setting(
    0.5, "TTT_WEIGHT_DECAY", RATE, "weight decay of the adapters: decoupled in Adam, added to the gradient in SGD",
    "weight_decay",
  )  # fmt: skip
  beta1: float = setting(
    0.0, "TTT_BETA1", DECAY, "the adapters' Adam: decay of the first moment; their SGD: momentum", "beta1"
  )
  beta2: float = setting(0.99, "TTT_BETA2", DECAY, "the adapters' Adam: decay of the second moment", "beta2")
  grad_steps: int = setting(1, "TTT_GRAD_STEPS", Range(0, 1000), "updates after each chunk", "grad_steps")
  optimizer: Literal["adam", "sgd"] = setting("adam", "TTT_OPTIMIZER", None, "how the adapters move", "optimizer")
  mask: Literal["", "all", "baseline_all", "no_q", "no_v", "no_qv"] = setting(
    "no_qv", "TTT_MASK", None, "which of queries and values have no adapter", "mask"
  )
  q: bool | None = setting(
    None, "TTT_Q_LORA", None, "whether queries have an adapter; unset: as the mask says", "q_lora"
  )
  k: bool = setting(True, "TTT_K_LORA", None, "whether keys have an adapter", "k_lora")
  v: bool | None = setting(
    None, "TTT_V_LORA", None, "whether values have an adapter; unset: as the mask says", "v_lora"
  )
  o: bool = setting(True, "TTT_O_LORA", None, "whether attention outputs have an adapter", "o_lora")
  mlp: bool = setting(True, "TTT_MLP_LORA", None, "whether MLPs have an adapter", "mlp_lora")
  warm_start_a: bool = setting(
    True, "TTT_WARM_START_A", None, "whether a batch starts with the matrices A of the batch before", "warm_start_a"
  )
  warm_start_mean: bool = setting(
    False, "TTT_WARM_START_MEAN_ENABLED", None,
    "whether short documents start from the mean of earlier batches' adapters", "warm_start_mean",
  )  # fmt: skip
  warm_start_mean_doc_len: int | None = setting(
    None, "TTT_WARM_START_MEAN_DOC_LEN", INDEX,
    "tokens of the longest document that starts from that mean; unset: as ttt.short.doc_len", "warm_start_mean_doc_len",
  )  # fmt: skip
  warm_start_mean_momentum: float = setting(
    0.95, "TTT_WARM_START_MEAN_MOMENTUM", DECAY, "weight of earlier batches in that mean", "warm_start_mean_momentum"
  )
  train_min_doc_len: int = setting(
    0, "TTT_TRAIN_MIN_DOC_LEN", INDEX, "documents of fewer tokens are only scored", "train_min_doc_len"
  )
  train_max_doc_len: int = setting(
    0, "TTT_TRAIN_MAX_DOC_LEN", INDEX, "documents of more tokens are only scored; 0: no limit", "train_max_doc_len"
  )

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

  doc_len: int = setting(2000, "TTT_SHORT_DOC_LEN", INDEX, "tokens of the longest short document", "short_doc_len")
  score_first: bool = setting(
    True, "TTT_SHORT_SCORE_FIRST_ENABLED", None, "whether short documents have smaller chunks", "short_score_first"
  )
  score_first_steps: tuple[ChunkStep, ...] = setting(
    (ChunkStep(256, 16), ChunkStep(2000, 32)), "TTT_SHORT_SCORE_FIRST_STEPS", (LENGTH, LENGTH),
    "chunk sizes of short documents by their length", "short_score_first_steps",
  )  # fmt: skip
  chunk_size: int = setting(
    32, "TTT_SHORT_CHUNK_SIZE", LENGTH, "chunk size of short documents without score_first_steps", "short_chunk_size"
  )
  lora: bool = setting(
    False, "TTT_SHORT_LORA_ENABLED", None, "whether short documents have adapters of their own kind", "short_lora"
  )
  rank: int | None = setting(
    None, "TTT_SHORT_LORA_RANK", WIDTH, "rank of those adapters; unset: as for the others", "short_lora_rank"
  )
  lr: float | None = setting(
    None, "TTT_SHORT_LORA_LR", RATE, "learning rate of those adapters; unset: as for the others", "short_lora_lr"
  )
  weight_decay: float | None = setting(
    None, "TTT_SHORT_WEIGHT_DECAY", RATE, "weight decay of those adapters; unset: as for the others",
    "short_weight_decay",
  )  # fmt: skip
  beta2: float | None = setting(
    None, "TTT_SHORT_BETA2", DECAY, "decay of the second moment for those adapters; unset: as for the others",
    "short_beta2",
  )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
  """Global phases: all weights learn from documents that are scored."""

  prefix_docs: int = setting(
    2500, "PHASED_TTT_PREFIX_DOCS", INDEX, "documents scored before the last global phase; 0: no phase", "prefix_docs"
  )
  count: int = setting(1, "PHASED_TTT_NUM_PHASES", COUNT, "global phases, spread evenly over prefix_docs", "num_phases")
  lr: float = setting(
    0.001, "GLOBAL_TTT_LR", RATE, "first learning rate of a phase's SGD; it falls as a cosine", "global_lr"
  )
  momentum: float = setting(0.9, "GLOBAL_TTT_MOMENTUM", DECAY, "momentum of a phase's SGD", "global_momentum")
  epochs: int = setting(1, "GLOBAL_TTT_EPOCHS", INDEX, "passes of a phase over the scored documents", "global_epochs")
  chunk_tokens: int = setting(
    32768, "GLOBAL_TTT_CHUNK_TOKENS", INDEX, "tokens of a phase's chunk of the joined documents", "global_chunk_tokens"
  )
  batch_seqs: int = setting(32, "GLOBAL_TTT_BATCH_SEQS", INDEX, "most rows of a phase's update", "global_batch_seqs")
  grad_clip: float = setting(
    1.0, "GLOBAL_TTT_GRAD_CLIP", NOT_NEGATIVE, "largest norm of a phase's gradient; 0: no limit", "global_grad_clip"
  )
  warmup_chunks: int = setting(
    0, "GLOBAL_TTT_WARMUP_CHUNKS", INDEX, "chunks over which a phase's learning rate rises first",
    "global_warmup_chunks",
  )  # fmt: skip
  warmup_start_lr: float = setting(
    0.0, "GLOBAL_TTT_WARMUP_START_LR", RATE, "learning rate at the beginning of that rise", "global_warmup_start_lr"
  )
  respect_documents: bool = setting(
    True, "GLOBAL_TTT_RESPECT_DOC_BOUNDARIES", None, "whether attention stays within documents in a phase",
    "global_respect_documents",
  )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TTTConfig:
  """Score-first test-time training."""

  enabled: bool = setting(True, "TTT_ENABLED", None, "whether a run scores with test-time training, then audits")
  order: Literal["strict", "reference"] = setting(
    "strict", None, None,
    "order of the documents: strict declares one and builds hints in it; reference repeats the published procedure",
  )  # fmt: skip
  method: Literal["exact", "cached"] = setting(
    "exact", None, None, "exact computes each chunk's window afresh; cached keeps the keys and values of earlier chunks"
  )
  chains: int = setting(
    0, None, INDEX,
    "chains of batches that run side by side, each with its own adapters' A; 0: one for each rank, as in the reference",
  )  # fmt: skip
  batch_size: int = setting(24, "TTT_BATCH_SIZE", COUNT, "documents whose adapters move in step")
  seq_len: int = setting(3072, "TTT_EVAL_SEQ_LEN", LENGTH, "tokens of the longest window of test-time training")
  chunk_size: int = setting(64, "TTT_CHUNK_SIZE", LENGTH, "targets between two updates")
  eval_batches: tuple[int, ...] = setting(
    (), "TTT_EVAL_BATCHES", (LENGTH,),
    "batches, from 1, after which the running score is logged, shortest documents first; empty: longest first",
  )  # fmt: skip

  lora: LoRAConfig = LoRAConfig()
  short: ShortConfig = ShortConfig()
  phase: PhaseConfig = PhaseConfig()


@dataclasses.dataclass(frozen=True)
class HintConfig:
  """Hints from n-grams of the text so far."""

  enabled: bool = setting(True, "NGRAM_TILT_ENABLED", None, "whether distributions are tilted towards n-gram hints")
  # The published list of coefficients ends with the one for pairs of order 32.
  order: int = setting(16, "TOKEN_ORDER", Range(1, 32), "tokens of an n-gram, the predicted one counted")
  backoff: tuple[int, ...] = setting(
    (), "TOKEN_BACKOFF", (Range(1, 32),),
    "tokens of shorter n-grams, of which the longest that has a hint gives it where order has none",
  )  # fmt: skip
  threshold: float = setting(
    0.8, "TOKEN_THRESHOLD", SHARE, "least share of a context's continuations that makes a hint"
  )
  boost: float = setting(2.625, "TOKEN_BOOST", Range(-50, 50), "what a hint adds to its token's logit, in nats")  # β
  strength: Literal["fixed", "mixture"] = setting(
    "fixed", "TOKEN_STRENGTH", None,
    "fixed: every hint adds boost; mixture: what it adds is learnt from the hints before it, kind by kind",
  )  # fmt: skip
  table: Literal["exact", "reference"] = setting(
    "exact", None, None, "exact compares contexts in full; reference uses the published hash keys, which may collide"
  )

  @property
  def orders(self) -> tuple[int, ...]:
    """Tokens of the n-grams that are asked for a hint, in turn."""
    return (self.order, *sorted(self.backoff, reverse=True))

"""Names of the reference that this system knows but has no setting for, and the values of them that it accepts."""

from collections.abc import Mapping

from pgolf_jax.errors import UserError

# Name → the values accepted, and why no others are. `None` accepts any: the name has no effect in this recipe.
FIXED: dict[str, tuple[tuple[str, ...] | None, str]] = {
  "WITHIN_BOOST": (
    ("0",),
    "the within-word channel decides from the target token whether to hint, which breaks causality",
  ),
  "WORD_BOOST": (
    ("0",),
    "the word-start channel decides from the target token whether to hint, which breaks causality",
  ),
  "AGREE_ADD_BOOST": (("0",), "it belongs to the target-gated channels, which break causality"),
  "WITHIN_TAU": (None, "inert while WITHIN_BOOST is 0"),
  "WORD_TAU": (None, "inert while WORD_BOOST is 0"),
  "WORD_ORDER": (None, "inert while WORD_BOOST is 0"),
  "WORD_NORMALIZE": (None, "inert while WORD_BOOST is 0"),
  "NGRAM_HINT_PRECOMPUTE_OUTSIDE": (("0",), "hints are built inside the evaluation clock"),
  "ROPE_YARN": (("0",), "rotary frequencies are never rescaled"),
  "ROPE_TRAIN_SEQ_LEN": (None, "inert while ROPE_YARN is 0"),
  "TIE_EMBEDDINGS": (("1",), "the output head is the embedding"),
  "EMBED_LR": (None, "inert while TIE_EMBEDDINGS is 1"),
  "ATTN_OUT_GATE_ENABLED": (("0",), "this gate of older stacks is not part of the recipe"),
  "GATED_ATTN_ENABLED": (("0",), "this gate of older stacks is not part of the recipe"),
  "SKYLIGHT_UW_FLOOR": (("0",), "update floors are not part of the recipe"),
  "SKYLIGHT_NORM_EMA": (("0",), "row-variance averaging is not part of the recipe"),
  "EVAL_INCLUDE_TAIL": (("1",), "every target is scored, the last partial span too"),
  "EVAL_STRIDE": (None, "inert: spans do not overlap"),
  "FUSED_CE_ENABLED": (None, "inert: the fused and the plain loss are the same function"),
  "COMPILE_SHAPE_WARMUP": (None, "inert: every shape is compiled before the clock starts"),
  "COMPILE_SHAPE_WARMUP_ITERS": (None, "inert: every shape is compiled before the clock starts"),
  "COMPILE_SHAPE_WARMUP_LOOP_MODES": (None, "inert: every shape is compiled before the clock starts"),
  "MIDRUN_CAP_LOG_UPDATES": (None, "inert: every step's learning rate is in metrics.jsonl"),
  "COMPRESSOR": (("pergroup", "brotli", "lzma"), "the artifact's codec is quantize.codec, zstd or entropy"),
}


def refuse_unsupported(environ: Mapping[str, str]) -> None:
  """Raises UserError, with the reason, if a name of FIXED has a value that is not supported."""
  for name, (allowed, reason) in FIXED.items():
    if name in environ and allowed is not None and not _same_value(environ[name], allowed):
      raise UserError(f"{name}={environ[name]} is not supported: {reason}; set it to {allowed[0]} or unset it.")


def _same_value(text: str, allowed: tuple[str, ...]) -> bool:
  def canonical(s: str):
    try:
      return float(s)
    except ValueError:
      return s.strip().lower()

  return canonical(text) in [canonical(a) for a in allowed]

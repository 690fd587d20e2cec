"""Training a lossless SentencePiece tokenizer."""

import io
from collections.abc import Iterable

import sentencepiece

from pgolf_jax.data.caseops import MARKERS
from pgolf_jax.data.shards import BOS
from pgolf_jax.data.tokenizer import MAX_PIECES, Tokenizer
from pgolf_jax.errors import UserError


def train_tokenizer(coded_texts: Iterable[str], vocab_size: int, *, is_caseops: bool = True) -> Tokenizer:
  """BPE pieces of `coded_texts`, one document each; the same texts give the same model.

  Pad is 0, bos 1, eos 2, unk 3; the CaseOps markers, if any, are 4 to 7; then 256 byte pieces, merges, characters.
  Identity normalisation and all white space kept, so decoding gives the text back byte for byte.

  Raises:
    UserError: the texts do not yield `vocab_size` pieces, or that many do not fit in 16 bits.
  """
  markers = list(MARKERS) if is_caseops else []
  least = 4 + len(markers) + 256 + 1
  if not least <= vocab_size <= MAX_PIECES:
    raise UserError(
      f"a vocabulary of {vocab_size}: choose from {least} (bytes and symbols alone) to {MAX_PIECES} pieces"
    )
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(coded_texts),
      model_writer=model,
      model_type="bpe",
      vocab_size=vocab_size,
      character_coverage=0.999,
      normalization_rule_name="identity",
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      allow_whitespace_only_pieces=True,
      byte_fallback=True,
      split_digits=True,
      pad_id=0,
      bos_id=BOS,
      eos_id=2,
      unk_id=3,
      user_defined_symbols=markers,
      max_sentence_length=2**30,  # a document counts as one sentence, and none is left out for its length
      minloglevel=2,
    )
  except (RuntimeError, OSError, ValueError) as error:
    raise UserError(
      f"no tokenizer of {vocab_size} pieces can be trained on this text ({_reason(error)}); "
      "give more text or ask for a vocabulary of another size"
    ) from error
  return Tokenizer(model.getvalue(), name="the tokenizer just trained")


def _reason(error: Exception) -> str:
  """The last sentence of SentencePiece's message, without its source location."""
  return str(error).strip().splitlines()[-1].rpartition("] ")[2] or type(error).__name__

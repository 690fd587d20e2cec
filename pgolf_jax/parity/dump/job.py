"""What to dump, and the text for it: from shards, or random documents of mixed length that share phrases."""

import dataclasses
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pgolf_jax.data.shards import (
  BOS,
  ValidationData,
  list_shards,
  load_validation,
  read_shard,
  shard_path,
  write_shard,
)
from pgolf_jax.errors import UserError
from pgolf_jax.parity import Arrays
from pgolf_jax.parity.dump.script import Script, as_arrays
from pgolf_jax.settings import ModelConfig

_PHRASES = 6
_PHRASE_TOKENS = 40
_SHARE_OF_PHRASES = 0.5
_LONGEST_OVER_SHORTEST = 30.0


def document_lengths(rng: np.random.Generator, tokens: int, documents: int) -> list[int]:
  """Lengths of documents that fill `tokens`, at least two tokens each, the longest many times the shortest.

  Raises:
    UserError: there is no room for so many.
  """
  if documents < 1 or 2 * documents > tokens:
    raise UserError(
      f"{tokens} tokens cannot hold {documents} documents of at least two tokens; ask for fewer documents or more "
      "tokens."
    )
  weight = np.exp(rng.uniform(0, np.log(_LONGEST_OVER_SHORTEST), documents))
  lengths = 2 + np.floor((tokens - 2 * documents) * weight / weight.sum()).astype(int)
  lengths[np.argmax(weight)] += tokens - lengths.sum()
  return lengths.tolist()


def random_stream(rng: np.random.Generator, lengths: list[int], vocab_size: int) -> np.ndarray:
  """Documents of these lengths, each begun by bos; half of their tokens are phrases that occur again and again."""
  low = min(BOS + 1, vocab_size - 1)
  phrases = rng.integers(low, vocab_size, (_PHRASES, _PHRASE_TOKENS))
  documents = []
  for length in lengths:
    parts, size = [np.array([BOS])], 1
    while size < length:
      if rng.random() < _SHARE_OF_PHRASES:
        parts.append(phrases[rng.integers(_PHRASES)])
      else:
        parts.append(rng.integers(low, vocab_size, rng.integers(1, 2 * _PHRASE_TOKENS)))
      size += len(parts[-1])
    documents.append(np.concatenate(parts)[:length])
  return np.concatenate(documents)


def stream(rng: np.random.Generator, tokens: int, documents: int, vocab_size: int, data: Path | None) -> ValidationData:
  """The validation stream of a case, of `tokens` tokens, with the bytes of each.

  Args:
    documents: how many to make, where there is no `data`.
    data: folder of shards; the first tokens of its validation stream are taken.
  """
  if data is None:
    made = random_stream(rng, document_lengths(rng, tokens, documents), vocab_size)
    return ValidationData(made.astype(np.int32), np.where(made == BOS, 0, 1 + made % 5).astype(np.int32))
  validation = load_validation(data)
  if len(validation.tokens) < tokens:
    raise UserError(
      f"{data} has {len(validation.tokens)} validation tokens, fewer than {tokens}; ask for fewer with --tokens."
    )
  _refuse_large(validation.tokens[:tokens], vocab_size, data)
  return ValidationData(validation.tokens[:tokens], validation.token_bytes[:tokens])


def write_shards(folder: Path, validation: ValidationData, train: list[np.ndarray]) -> None:
  """Writes the data folder of a case."""
  folder.mkdir(parents=True)
  for index, tokens in enumerate(train):
    write_shard(shard_path(folder, "train", index), tokens)
  write_shard(shard_path(folder, "val", 0), validation.tokens)
  write_shard(shard_path(folder, "val_bytes", 0), validation.token_bytes)


def training_text(
  rng: np.random.Generator, tokens: int, row: int, vocab_size: int, data: Path | None
) -> list[np.ndarray]:
  """Shards with at least `tokens` tokens: of random documents, or the beginning of a data folder's.

  Args:
    row: tokens of a micro-batch; random documents are about half as long.
  """
  if data is None:
    shards = []
    for share in (0.4, 0.7):  # the second one is begun within the run
      size = max(int(share * tokens), 64)
      shards.append(random_stream(rng, document_lengths(rng, size, max(size * 2 // row, 4)), vocab_size))
    return shards
  shards = []
  for path in list_shards(data, "train"):
    shard = np.asarray(read_shard(path))
    wanted = tokens - sum(map(len, shards))
    starts = np.flatnonzero(shard == BOS)
    if not len(starts):
      raise UserError(f"{path} has no bos, so no document begins in it; prepare the data again.")
    shards.append(shard[: starts[0] + wanted])
    _refuse_large(shards[-1], vocab_size, data)
    if len(shards[-1]) >= wanted:
      break
  return shards


def _refuse_large(tokens: np.ndarray, vocab_size: int, data: Path) -> None:
  if tokens.max() >= vocab_size:
    raise UserError(
      f"{data} has the token {tokens.max()}, but the script's vocabulary has {vocab_size}; set VOCAB_SIZE with --set, "
      "or name the data that belongs to it."
    )


@dataclasses.dataclass
class Job:
  """What to dump.

  Attributes:
    model: in float32, with the weights that the case starts from.
    folder: of the case; shards go into it.
    tokens: of the row or the stream.
    max_doc_len: longest segment of a `forward` case, tokens.
    activations: keep those of a `forward` case.
    about: what case.json says besides.
  """

  script: Script
  model: torch.nn.Module
  folder: Path
  tokens: int
  documents: int
  max_doc_len: int
  steps: int
  data: Path | None
  rng: np.random.Generator
  activations: bool
  config: ModelConfig
  about: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def h(self) -> Any:
    return self.script.hyperparameters

  @property
  def module(self) -> types.ModuleType:
    return self.script.module

  @property
  def device(self) -> str:
    return self.script.places.device

  def layers(self, looping: bool) -> list[int]:
    """The layers in the order in which they run."""
    encoder, decoder = self.config.layer_order(looping)
    return [*encoder, *decoder]

  def stream(self, tokens: int) -> ValidationData:
    return stream(self.rng, tokens, self.documents, self.h.vocab_size, self.data)

  def row(self) -> np.ndarray:
    """Tokens [T + 1] of a packed row."""
    return self.stream(self.tokens + 1).tokens

  def params(self) -> Arrays:
    return as_arrays(dict(self.model.named_parameters()), "params/")

  def restart(self, inputs: Arrays) -> None:
    """Gives the model the weights of the case's inputs."""
    with torch.no_grad():
      for name, p in self.model.named_parameters():
        p.copy_(torch.tensor(inputs[f"params/{name}"]))

  def set_looping(self, looping: bool) -> None:
    if hasattr(self.model, "looping_active"):
      self.model.looping_active = looping and self.h.num_loops > 0
    elif getattr(self.h, "num_loops", 0) > 0:
      raise UserError(
        "The script's GPT has no looping_active, so the loop that its settings ask for cannot be switched."
      )

  def segments(self, tokens_T: torch.Tensor) -> dict[str, Any]:
    """The arguments with which the script's model keeps the segments of a row apart."""
    T = len(tokens_T)
    starts = (tokens_T == 1).nonzero().flatten().tolist()
    if hasattr(self.module, "_build_cu_seqlens"):
      boundaries, longest = self.module._build_cu_seqlens(starts, T, tokens_T.device, self.max_doc_len, 64)
      return {"cu_seqlens": boundaries, "max_seqlen": longest}
    self.script.places.used["_build_cu_seqlens"] = "segments from each bos, cut at the longest length"
    starts = sorted({0, *starts})
    cut = [at for a, b in zip(starts, [*starts[1:], T], strict=True) for at in range(a, b, self.max_doc_len)] + [T]
    boundaries = torch.tensor(cut, dtype=torch.int32, device=tokens_T.device)
    return {"cu_seqlens": boundaries, "max_seqlen": int(boundaries.diff().max())}

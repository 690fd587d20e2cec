"""What counts against the budget: the artifact's bytes by stream and tensor, and the code that evaluation needs.

The tokenizer is shown apart: the rules do not count it.
"""

import dataclasses
import math

from pgolf_jax.quantize.artifact import Artifact, read
from pgolf_jax.quantize.artifact.streams import describe, split
from pgolf_jax.submission.bundle import Code


@dataclasses.dataclass(frozen=True)
class Account:
  """Bytes of a submission."""

  by_stream: dict[str, int]
  by_tensor: dict[str, float]  # a stream's bytes shared out by values; the header belongs to no tensor
  code: int  # archive and starter
  code_files: int
  tokenizer: int  # does not count
  budget: int

  @property
  def artifact(self) -> int:
    return sum(self.by_stream.values())

  @property
  def total(self) -> int:
    return self.artifact + self.code

  @property
  def over(self) -> int:
    """Bytes above the budget; negative where some are left."""
    return self.total - self.budget


def account(data: bytes, code: Code, *, budget: int, tokenizer: int = 0) -> Account:
  """Returns the account of an artifact with the code that ships beside it.

  Args:
    data: the artifact.
    budget: bytes that artifact and code may take.
    tokenizer: bytes of the tokenizer model.
  """
  artifact = read(data)
  return Account(artifact.stream_bytes, tensor_bytes(artifact), code.size, code.files, tokenizer, budget)


def tensor_bytes(artifact: Artifact) -> dict[str, float]:
  """Returns compressed bytes by tensor: each stream's, shared out over its tensors by their number of values."""
  shares = dict.fromkeys(artifact.tensors, 0.0)
  for stream in split([describe(name, tensor) for name, tensor in artifact.tensors.items()]):
    values = sum(math.prod(shape) for *_, shape in stream.arrays)
    for name, _, shape in stream.arrays:
      shares[name] += artifact.stream_bytes[stream.name] * math.prod(shape) / values
  return shares


def table(account: Account) -> str:
  """Returns the account as lines of text, the largest stream first."""
  rows = [(name, f"{size:,}") for name, size in sorted(account.by_stream.items(), key=lambda item: -item[1])]
  rows += [("artifact", f"{account.artifact:,}"), (f"code ({account.code_files} files)", f"{account.code:,}")]
  rows += [("total", f"{account.total:,}"), ("budget", f"{account.budget:,}"), ("left", f"{-account.over:,}")]
  rows += [("tokenizer, apart", f"{account.tokenizer:,}")]
  width = max(len(name) for name, _ in rows)
  return "\n".join(f"{name:<{width}} {size:>14}" for name, size in rows)

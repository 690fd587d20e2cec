"""Cutting a batch's documents into chunks, and the chunks into calls of a few compiled shapes.

A chunk's window grows with its place in the document and documents of a batch end one after another, so the work of a
step varies. Every compiled shape costs seconds before the clock, every bucket wastes time inside it: the shapes are
chosen for the lengths at hand.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from pgolf_jax.scoring.documents import Batch, Document
from pgolf_jax.scoring.flops import Costs
from pgolf_jax.settings.config import TTTConfig

SKIP, SCORE, LEARN = 0, 1, 2
"""Kinds of step: nothing (padding), score alone (nobody learns from it), score and then update."""

STEPS_PER_CALL = 8
"""Chunks in one scan. More would save dispatches; a bucket that needs fewer skips the rest."""

_ROUND_WINDOW = 16
_TARGET_EFFICIENCY = 0.85
_COMPILATION_FLOPS = 2e11
"""What a CPU core could compute while it compiles one more shape; next to nothing for an accelerator."""


class Step(NamedTuple):
  """Chunk k of all documents of a batch."""

  k: int
  active: int  # documents that have a chunk k: the `active` longest
  window: int  # tokens of the longest window
  kind: int  # SCORE or LEARN


class Shape(NamedTuple):
  """What a compiled scan is made for."""

  slots: int  # rows on each device
  window: int  # tokens of a row
  width: int  # targets of a chunk

  def covers(self, other: "Shape") -> bool:
    return self.slots >= other.slots and self.window >= other.window and self.width >= other.width


class Call(NamedTuple):
  """Neighbouring steps that go into one scan."""

  shape: Shape
  steps: tuple[Step, ...]


def chunk_size(ttt: TTTConfig, longest: int) -> int:
  """Targets between two updates, for a batch whose longest document has this many tokens."""
  if not ttt.short.score_first:
    return ttt.chunk_size
  if steps := ttt.short.score_first_steps:
    return next((size for length, size in steps if longest <= length), ttt.chunk_size)
  return ttt.short.chunk_size if longest <= ttt.short.doc_len and ttt.short.chunk_size > 0 else ttt.chunk_size


def learns(ttt: TTTConfig, document: Document) -> bool:
  """Whether the settings let this document move its adapters and take part in the global phases."""
  shortest, longest = ttt.lora.train_min_doc_len, ttt.lora.train_max_doc_len
  return (shortest <= 0 or document.length >= shortest) and (longest <= 0 or document.length <= longest)


def steps(ttt: TTTConfig, batch: Batch) -> list[Step]:
  """All chunks of a batch, in order."""
  size = chunk_size(ttt, batch.longest)
  targets = np.array([d.targets for d in batch.documents])
  learning = np.array([d.targets for d in batch.documents if learns(ttt, d)] or [0])
  found = []
  for k in range(-(-int(targets.max()) // size)):
    window = min((k + 1) * size, int(targets.max()), ttt.seq_len)
    # A document's last chunk is scored, but nothing of it is left to learn for.
    kind = LEARN if ttt.lora.grad_steps > 0 and (learning > (k + 1) * size).any() else SCORE
    found.append(Step(k, int((targets > k * size).sum()), window, kind))
  return found


def need(ttt: TTTConfig, step: Step, size: int, devices: int) -> Shape:
  """The smallest shape in which a step can run."""
  window = min(-(-step.window // _ROUND_WINDOW) * _ROUND_WINDOW, ttt.seq_len)
  return Shape(-(-step.active // devices), window, size)


def choose_shapes(
  ttt: TTTConfig, batches: Iterable[Batch], costs: Costs, *, devices: int = 1, limit: int = 16
) -> list[Shape]:
  """A few shapes in which all steps of all batches can run with little padding.

  Starts with the one that covers everything, then adds the one that saves most, until the padding is 15 % of the work,
  there are `limit` of them, or the next would save less work than its compilation is.
  """
  weight: Counter[tuple[Shape, int]] = Counter()
  for batch in batches:
    size = chunk_size(ttt, batch.longest)
    weight.update((need(ttt, step, size, devices), step.kind) for step in steps(ttt, batch))
  needs = sorted({shape for shape, _ in weight})
  count = np.array([[weight[shape, kind] for kind in (SCORE, LEARN)] for shape in needs], np.float64)

  def cost(shape: Shape) -> np.ndarray:
    """Of each need, if it ran in this shape; infinite where it does not fit."""
    each = np.array([costs.step(*shape, learn=False), costs.step(*shape, learn=True)])
    fits = (np.array(needs) <= np.array(shape)).all(axis=1)
    return np.where(fits, count @ each, np.inf)

  most = Shape(*(max(column) for column in zip(*needs, strict=True)))
  candidates = sorted({most, *needs})
  table = np.stack([cost(shape) for shape in candidates])
  own = np.array([cost(shape)[i] for i, shape in enumerate(needs)])
  chosen = [candidates.index(most)]
  best = table[chosen[0]]
  while len(chosen) < limit and own.sum() < _TARGET_EFFICIENCY * best.sum():
    gain = (best - np.minimum(best, table)).sum(axis=1)
    if gain.max() < _COMPILATION_FLOPS:
      break
    chosen.append(int(gain.argmax()))
    best = np.minimum(best, table[chosen[-1]])
  return [candidates[i] for i in chosen]


def calls(ttt: TTTConfig, batch: Batch, shapes: Sequence[Shape], costs: Costs, *, devices: int = 1) -> list[Call]:
  """A batch's steps, each in its cheapest shape, neighbours of one shape together."""
  size = chunk_size(ttt, batch.longest)
  found: list[Call] = []
  for step in steps(ttt, batch):
    wanted = need(ttt, step, size, devices)
    fitting = [shape for shape in shapes if shape.covers(wanted)]
    if not fitting:
      raise ValueError(f"no shape among {shapes} covers {wanted}")
    shape = min(fitting, key=lambda s, learn=step.kind == LEARN: costs.step(*s, learn=learn))
    if found and found[-1].shape == shape and len(found[-1].steps) < STEPS_PER_CALL:
      found[-1] = Call(shape, (*found[-1].steps, step))
    else:
      found.append(Call(shape, (step,)))
  return found


def own_flops(ttt: TTTConfig, costs: Costs, document: Document, size: int) -> float:
  """What a document's chunks need by themselves, without any padding."""
  found = 0.0
  for k in range(-(-document.targets // size)):
    end = min((k + 1) * size, document.targets)
    learn = learns(ttt, document) and end < document.targets
    found += costs.row(min(end, ttt.seq_len), end - k * size, learn=learn)
  return found

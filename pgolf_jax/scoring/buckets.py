"""A batch's documents cut into chunks, and the chunks put into calls of a few compiled shapes.

A chunk's window grows with its place in the document, and documents of a batch end one after another, so the work of a
step varies. Every compiled shape costs seconds before the clock, every padded row or window costs time within it: the
shapes are chosen for the lengths at hand.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from pgolf_jax.model import flops
from pgolf_jax.model.adapters import widths
from pgolf_jax.scoring.documents import Batch, Document
from pgolf_jax.settings import ModelConfig, TTTConfig

SKIP, SCORE, LEARN = 0, 1, 2
"""Kinds of step: nothing (padding), score alone (no document learns from it), score and then update."""

STEPS_PER_CALL = 8
"""Chunks in one scan. More would save dispatches; a bucket that needs fewer skips the rest."""

_ROUND_WINDOW = 16
_MOST_SHAPES = 16
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
  """What a scan is compiled for."""

  slots: int  # rows on each device
  window: int  # tokens of a row
  width: int  # targets of a chunk

  def covers(self, other: "Shape") -> bool:
    """Whether a step that needs `other` can run in this shape."""
    return self.slots >= other.slots and self.window >= other.window and self.width >= other.width


class Call(NamedTuple):
  """Neighbouring steps that go into one scan."""

  shape: Shape
  steps: tuple[Step, ...]

  @property
  def updates(self) -> int:
    """Steps after which adapters move."""
    return sum(step.kind == LEARN for step in self.steps)


@dataclasses.dataclass(frozen=True)
class Costs:
  """Floating-point operations of test-time training; see model/flops.py.

  Attributes:
    token: one token through all layers, adapters included, without attention's scores.
    pair: one query and one key, in all layers.
    target: one target through the head and its adapter.
    cached: whether the keys and values of earlier chunks are kept rather than computed again.
    updates: gradient steps of a learning chunk, each with a pass of its own.
  """

  token: float
  pair: float
  target: float
  cached: bool
  updates: int

  @classmethod
  def estimate(cls, model: ModelConfig, ttt: TTTConfig) -> "Costs":
    """Returns the costs under these settings."""
    kinds = widths(model, ttt)
    layer_adapters = sum(flops.adapter(model, ttt.lora.rank, width) for kind, width in kinds.items() if kind != "head")
    return cls(
      token=flops.token(model, looping=True) + flops.positions(model, looping=True) * layer_adapters,
      pair=flops.pair(model, looping=True),
      target=flops.head(model) + flops.adapter(model, ttt.lora.rank, model.vocab_size),
      cached=ttt.method == "cached",
      updates=ttt.lora.grad_steps,
    )

  def row(self, window: int, width: int, *, learn: bool) -> float:
    """One document's chunk of `width` targets at the end of a window.

    An update computes the gradients of the matrices' inputs, which costs as much as the forward pass.
    """
    tokens = width if self.cached else window
    pairs = width * window if self.cached else flops.causal_pairs(window)
    passes = max(2 * self.updates, 1) if learn else 1
    return passes * (tokens * self.token + pairs * self.pair + width * self.target)

  def step(self, shape: Shape, *, learn: bool) -> float:
    """A step in a compiled shape, on one device."""
    return shape.slots * self.row(shape.window, shape.width, learn=learn)

  def call(self, call: Call) -> float:
    """All steps of a call, on one device."""
    return sum(self.step(call.shape, learn=step.kind == LEARN) for step in call.steps)

  def without_padding(self, ttt: TTTConfig, batch: Batch) -> float:
    """What the chunks of a batch's documents need, each with a window of its own length."""
    each = zip(batch.documents, batch.learns, strict=True)
    return sum(self._document(ttt.seq_len, document, batch.chunk_size, learns) for document, learns in each)

  def _document(self, seq_len: int, document: Document, size: int, learns: bool) -> float:
    total = 0.0
    for first in range(0, document.targets, size):
      end = min(first + size, document.targets)
      total += self.row(min(end, seq_len), end - first, learn=learns and end < document.targets)
    return total


def steps(ttt: TTTConfig, batch: Batch) -> list[Step]:
  """Returns all chunks of a batch, in order."""
  size = batch.chunk_size
  targets = np.array([document.targets for document in batch.documents])
  learning = targets[np.array(batch.learns)]
  chunks = []
  for k in range(-(-int(targets.max()) // size)):
    window = min((k + 1) * size, int(targets.max()), ttt.seq_len)
    # A document's last chunk is scored, but nothing of the document is left to learn for.
    kind = LEARN if ttt.lora.grad_steps > 0 and (learning > (k + 1) * size).any() else SCORE
    chunks.append(Step(k, int((targets > k * size).sum()), window, kind))
  return chunks


def smallest_shape(ttt: TTTConfig, step: Step, size: int, devices: int) -> Shape:
  """Returns the smallest shape in which a step can run."""
  window = min(-(-step.window // _ROUND_WINDOW) * _ROUND_WINDOW, ttt.seq_len)
  return Shape(-(-step.active // devices), window, size)


def choose_shapes(ttt: TTTConfig, batches: Iterable[Batch], costs: Costs, *, devices: int) -> list[Shape]:
  """Chooses a few shapes in which all steps of all batches can run with little padding.

  The first covers everything. Then comes, each time, the one that saves most, until the padding is 15 % of the work,
  there are 16 of them, or the next would save less work than its compilation is.
  """
  times: Counter[tuple[Shape, int]] = Counter()
  for batch in batches:
    times.update((smallest_shape(ttt, step, batch.chunk_size, devices), step.kind) for step in steps(ttt, batch))
  needs = sorted({shape for shape, _ in times})
  count = np.array([[times[shape, kind] for kind in (SCORE, LEARN)] for shape in needs], np.float64)

  def cost(shape: Shape) -> np.ndarray:
    """Of each need, if it ran in this shape; infinite where it does not fit."""
    each = np.array([costs.step(shape, learn=False), costs.step(shape, learn=True)])
    fits = (np.array(needs) <= np.array(shape)).all(axis=1)
    return np.where(fits, count @ each, np.inf)

  largest = Shape(*(max(column) for column in zip(*needs, strict=True)))
  candidates = sorted({largest, *needs})
  cost_of_candidates = np.stack([cost(shape) for shape in candidates])
  least = sum(cost(shape)[i] for i, shape in enumerate(needs))
  chosen = [candidates.index(largest)]
  best = cost_of_candidates[chosen[0]]
  while len(chosen) < _MOST_SHAPES and least < _TARGET_EFFICIENCY * best.sum():
    gain = (best - np.minimum(best, cost_of_candidates)).sum(axis=1)
    if gain.max() < _COMPILATION_FLOPS:
      break
    chosen.append(int(gain.argmax()))
    best = np.minimum(best, cost_of_candidates[chosen[-1]])
  return [candidates[i] for i in chosen]


def calls(ttt: TTTConfig, batch: Batch, shapes: Sequence[Shape], costs: Costs, *, devices: int) -> list[Call]:
  """Puts a batch's steps, each in its cheapest shape, into calls; neighbours of one shape share a call."""
  result: list[Call] = []
  for step in steps(ttt, batch):
    need = smallest_shape(ttt, step, batch.chunk_size, devices)
    fitting = [shape for shape in shapes if shape.covers(need)]
    if not fitting:
      raise ValueError(f"no shape among {shapes} covers {need}")
    shape = min(fitting, key=lambda s, learn=step.kind == LEARN: costs.step(s, learn=learn))
    if result and result[-1].shape == shape and len(result[-1].steps) < STEPS_PER_CALL:
      result[-1] = Call(shape, (*result[-1].steps, step))
    else:
      result.append(Call(shape, (step,)))
  return result


class WorkPlan(NamedTuple):
  """Which shapes are compiled, and in which of them each batch runs."""

  shapes: list[Shape]
  calls: dict[int, list[Call]]  # by the batch's index
  useful_flops: float  # what the documents' own windows need
  executed_flops: float  # what runs, padding included, on all devices


def plan_work(ttt: TTTConfig, batches: Sequence[Batch], costs: Costs, *, devices: int) -> WorkPlan:
  """Chooses shapes for all batches, those of short documents included, and cuts the batches into calls."""
  shapes = choose_shapes(ttt, batches, costs, devices=devices)
  by_batch = {batch.index: calls(ttt, batch, shapes, costs, devices=devices) for batch in batches}
  executed = devices * sum(costs.call(call) for each in by_batch.values() for call in each)
  return WorkPlan(shapes, by_batch, sum(costs.without_padding(ttt, batch) for batch in batches), executed)

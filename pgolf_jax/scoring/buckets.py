"""A round's documents cut into chunks, and the chunks put into calls of a few compiled shapes.

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
from pgolf_jax.scoring.documents import Batch, Document, Layout, Round
from pgolf_jax.settings import ModelConfig, TTTConfig

SCORE, LEARN = 0, 1
"""Kinds of step: score alone, where no document learns from the chunk, or score and then update."""

_ROUND_WINDOW = 16


def steps_per_call(platform: str) -> int:
  """Returns how many chunks one scan takes; a call that has fewer skips the rest.

  More save dispatches, and on CPUs the temporaries that every call allocates anew. To skip is a branch, at which the
  host of a GPU waits for the device before it launches anything more: there a scan takes one chunk and skips none.
  """
  return 8 if platform in ("cpu", "tpu") else 1


class Limits(NamedTuple):
  """When a further shape is not worth its compilation."""

  shapes: int
  efficiency: float  # least work over work done, from which on there is little left to save
  compilation_flops: float  # what could be computed while a shape compiles

  @classmethod
  def choose(cls, platform: str) -> "Limits":
    """Returns those of a kind of device; an accelerator's own time is too dear to spend on padding."""
    return cls(16, 0.85, 2e11) if platform == "cpu" else cls(48, 0.92, 0)


class Step(NamedTuple):
  """Chunk k of all documents of a round."""

  k: int
  active: int  # all documents that have a chunk k are at the first `active` places
  window: int  # tokens of the longest window
  kind: int  # SCORE or LEARN


class Shape(NamedTuple):
  """What a scan is compiled for."""

  slots: int  # rows on each device
  window: int  # tokens of a row
  width: int  # targets of a chunk
  kind: int  # SCORE, or LEARN, which can do without learning

  def covers(self, other: "Shape") -> bool:
    """Whether a step that needs `other` can run in this shape."""
    return all(mine >= needed for mine, needed in zip(self, other, strict=True))


class Call(NamedTuple):
  """Neighbouring steps that go into one scan."""

  shape: Shape
  steps: tuple[Step, ...]


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

  def step(self, shape: Shape) -> float:
    """A step in a compiled shape, on one device."""
    return shape.slots * self.row(shape.window, shape.width, learn=shape.kind == LEARN)

  def call(self, call: Call) -> float:
    """All steps of a call, on one device."""
    return len(call.steps) * self.step(call.shape)

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


def learning_chunks(ttt: TTTConfig, batch: Batch) -> int:
  """Returns how many of a batch's chunks are learnt from: the last of its longest learning document is not."""
  targets = [d.targets for d, learns in zip(batch.documents, batch.learns, strict=True) if learns]
  return (max(targets) - 1) // batch.chunk_size if targets and ttt.lora.grad_steps else 0


def steps(ttt: TTTConfig, round_: Round) -> list[Step]:
  """Returns all chunks of a round, in order."""
  size, place_n = round_.chunk_size, round_.place_n
  targets = np.array([document.targets for document in round_.documents])
  learning = max(learning_chunks(ttt, batch) for batch in round_.batches)
  chunks = []
  for k in range(-(-int(targets.max()) // size)):
    window = min((k + 1) * size, int(targets.max()), ttt.seq_len)
    active = 1 + int(place_n[targets > k * size].max())
    chunks.append(Step(k, active, window, LEARN if k < learning else SCORE))
  return chunks


def smallest_shape(ttt: TTTConfig, step: Step, size: int, devices: int) -> Shape:
  """Returns the smallest shape in which a step can run."""
  window = min(-(-step.window // _ROUND_WINDOW) * _ROUND_WINDOW, ttt.seq_len)
  return Shape(-(-step.active // devices), window, size, step.kind)


def choose_shapes(
  ttt: TTTConfig, rounds: Iterable[Round], costs: Costs, *, devices: int, limits: Limits
) -> list[Shape]:
  """Chooses a few shapes in which all steps of all rounds can run with little padding.

  The first covers everything. Then comes, each time, the one that saves most, until one of the limits is reached.
  """
  times: Counter[Shape] = Counter()
  for each in rounds:
    times.update(smallest_shape(ttt, step, each.chunk_size, devices) for step in steps(ttt, each))
  needs = sorted(times)
  count = np.array([times[shape] for shape in needs], np.float64)

  def cost(shape: Shape) -> np.ndarray:
    """Of each need, if it ran in this shape; infinite where it does not fit."""
    fits = (np.array(needs) <= np.array(shape)).all(axis=1)
    return np.where(fits, count * costs.step(shape), np.inf)

  largest = Shape(*(max(column) for column in zip(*needs, strict=True)))
  candidates = sorted({largest, *needs})
  cost_of_candidates = np.stack([cost(shape) for shape in candidates])
  least = sum(cost(shape)[i] for i, shape in enumerate(needs))
  chosen = [candidates.index(largest)]
  best = cost_of_candidates[chosen[0]]
  while len(chosen) < limits.shapes and least < limits.efficiency * best.sum():
    gain = (best - np.minimum(best, cost_of_candidates)).sum(axis=1)
    if gain.max() <= limits.compilation_flops:
      break
    chosen.append(int(gain.argmax()))
    best = np.minimum(best, cost_of_candidates[chosen[-1]])
  return [candidates[i] for i in chosen]


def calls(
  ttt: TTTConfig, round_: Round, shapes: Sequence[Shape], costs: Costs, *, devices: int, platform: str
) -> list[Call]:
  """Puts a round's steps, each in its cheapest shape, into calls; neighbours of one shape share a call."""
  result: list[Call] = []
  for step in steps(ttt, round_):
    need = smallest_shape(ttt, step, round_.chunk_size, devices)
    fitting = [shape for shape in shapes if shape.covers(need)]
    if not fitting:
      raise ValueError(f"no shape among {shapes} covers {need}")
    shape = min(fitting, key=costs.step)
    if result and result[-1].shape == shape and len(result[-1].steps) < steps_per_call(platform):
      result[-1] = Call(shape, (*result[-1].steps, step))
    else:
      result.append(Call(shape, (step,)))
  return result


def stream_targets(layout: Layout, round_: Round, call: Call) -> tuple[np.ndarray, np.ndarray]:
  """Returns the stream's target at each place [S, B, X] of a call's output, and whether it is one."""
  document_B = Layout(layout.devices, call.shape.slots).documents_in(round_.place_n)
  start_n = np.array([document.start for document in round_.documents])
  targets_n = np.array([document.targets for document in round_.documents])
  targets_B = np.where(document_B >= 0, targets_n[document_B], 0)
  k_S, within_X = np.array([step.k for step in call.steps]), np.arange(call.shape.width)
  within = k_S[:, None, None] * round_.chunk_size + within_X
  valid = (within < targets_B[:, None]) & (within_X < round_.chunk_size)
  return np.where(valid, start_n[document_B][:, None] + within, 0), valid


class WorkPlan(NamedTuple):
  """Which shapes are compiled, and in which of them each round runs."""

  shapes: list[Shape]
  calls: list[list[Call]]  # of each round
  useful_flops: float  # what the documents' own windows need
  executed_flops: float  # what runs, padding included, on all devices


def plan_work(ttt: TTTConfig, rounds: Sequence[Round], costs: Costs, *, devices: int, platform: str) -> WorkPlan:
  """Chooses shapes for all rounds, those of short documents included, and cuts the rounds into calls."""
  shapes = choose_shapes(ttt, rounds, costs, devices=devices, limits=Limits.choose(platform))
  by_round = [calls(ttt, each, shapes, costs, devices=devices, platform=platform) for each in rounds]
  executed = devices * sum(costs.call(call) for each in by_round for call in each)
  useful = sum(costs.without_padding(ttt, batch) for each in rounds for batch in each.batches)
  return WorkPlan(shapes, by_round, useful, executed)

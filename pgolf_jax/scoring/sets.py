"""Sets of adapters: which one a batch starts from, and what of it is kept for the next.

A set of the full batch size is made at the start and after every global phase, one for short documents when they first
come (`TTT_SHORT_LORA_ENABLED`), and one for every batch of another size, which is used once. A kept set goes on with
its A (`TTT_WARM_START_A`); without that, every document draws its own.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pgolf_jax.model.adapters import Adapter, Adapters
from pgolf_jax.scoring.adapt import map_rows, row_axis
from pgolf_jax.scoring.documents import Batch
from pgolf_jax.scoring.programs import Programs
from pgolf_jax.scoring.store import flatten, unflatten
from pgolf_jax.settings.config import TTTConfig

Draw = Callable[[int, int], Adapters]
"""(number of the set, rank) → host arrays with a row for each document of a batch, in batch order; B is not read."""


class Lease(NamedTuple):
  """Adapters for one batch."""

  adapters: Adapters
  short: bool
  label: str  # of the set
  carried: int  # batches whose learning is in A
  kept: bool


def is_short(ttt: TTTConfig, batch: Batch) -> bool:
  """Whether a batch takes the adapters of short documents."""
  return ttt.short.lora and batch.longest <= ttt.short.doc_len


def document_rows(documents: int, slots: int, devices: int) -> np.ndarray:
  """Row of each document of a batch: from the longest down they are dealt to the devices in turn, first rows first."""
  rank = np.arange(documents)[::-1]
  return rank % devices * slots + rank // devices


class AdapterSets:
  """The sets of one evaluation.

  Args:
    seed: of the drawn A.
    draw: A from elsewhere, in place of random ones.
  """

  def __init__(self, ttt: TTTConfig, programs: Programs, *, seed: int, draw: Draw | None = None):
    self._ttt, self._programs, self._draw = ttt, programs, draw
    self._key = jax.random.key(seed)
    self._kept: dict[bool, Adapters] = {}
    self._label: dict[bool, str] = {}
    self._carried: dict[bool, int] = {}
    self._template: Adapters | None = None
    self._made = 0
    self.renew()

  def renew(self) -> None:
    """Forgets the kept sets; one of the full size is made."""
    self._kept.clear()
    if self._ttt.lora.warm_start_a and self._ttt.batch_size <= self._programs.rows:
      self._keep(False)
    else:
      self._made += 1  # the set is counted, but no batch is as large

  def _keep(self, short: bool) -> None:
    label = str(self._made)
    self._kept[short] = self._make(short, range(self._ttt.batch_size))
    self._label[short], self._carried[short] = label, 0

  def _make(self, short: bool, ids: Sequence[int]) -> Adapters:
    """A new set; row i of a batch draws by ids[i] alone, unless A comes from elsewhere."""
    programs = self._programs.adapters[short]
    rows = document_rows(len(ids), self._programs.slots, self._programs.mesh.size)
    number = self._made
    self._made += 1
    if self._draw is None:
      id_B = np.zeros(self._programs.rows, np.int64)
      id_B[rows] = list(ids)
      key = jax.random.fold_in(self._key, number if self._ttt.lora.warm_start_a else 0)
      return programs.draw(key, self._programs.row_integers(id_B))
    shapes = jax.eval_shape(programs.draw, self._key, jax.ShapeDtypeStruct((self._programs.rows,), jnp.int32))
    given = self._draw(number, programs.spec.rule.rank)
    placed = {}
    for kind, pair in shapes.items():
      A, B = (np.zeros(x.shape, np.float32) for x in pair)
      np.moveaxis(A, row_axis(kind), 0)[rows] = np.moveaxis(np.asarray(given[kind].A), row_axis(kind), 0)
      placed[kind] = Adapter(A, B)
    return programs.place(placed)

  def take(self, batch: Batch) -> Lease:
    """Adapters for a batch: A as the settings say, B zero, or both from the mean of earlier batches."""
    ttt, short = self._ttt, is_short(self._ttt, batch)
    kept = ttt.lora.warm_start_a and len(batch.documents) == ttt.batch_size
    if kept:
      if short not in self._kept:
        self._keep(short)
      adapters, label, carried = self._kept.pop(short), self._label[short], self._carried[short]
    else:
      ids = range(len(batch.documents)) if ttt.lora.warm_start_a else [d.index for d in batch.documents]
      adapters, label, carried = self._make(short, ids), str(self._made - 1), 0
    adapters = self._programs.adapters[short].without_B(adapters)
    limit = ttt.short.doc_len if ttt.lora.warm_start_mean_doc_len is None else ttt.lora.warm_start_mean_doc_len
    if ttt.lora.warm_start_mean and batch.longest <= limit and self._fits_template(adapters):
      rows = self._programs.rows
      filled = map_rows(lambda axis, mean: np.repeat(np.expand_dims(mean, axis), rows, axis), self._template)
      adapters, label, carried = self._programs.adapters[short].place(filled), "mean", 1
    return Lease(adapters, short, label, carried, kept)

  def needs_end(self, lease: Lease) -> bool:
    """Whether adapters after the batch matter to later ones."""
    return lease.kept or self._ttt.lora.warm_start_mean

  def give_back(self, batch: Batch, lease: Lease, adapters: Adapters) -> None:
    """Keeps what later batches start from of the adapters after a batch."""
    if self._ttt.lora.warm_start_mean:
      rows = document_rows(len(batch.documents), self._programs.slots, self._programs.mesh.size)
      host = self._programs.adapters[lease.short].fetch(adapters)
      mean = map_rows(lambda axis, x: np.take(x, rows, axis).mean(axis), host)
      if self._fits_template(adapters):
        m = np.float32(self._ttt.lora.warm_start_mean_momentum)
        mean = jax.tree.map(lambda old, new: m * old + (1 - m) * new, self._template, mean)
      self._template = mean
    if lease.kept:
      self._kept[lease.short] = adapters
      self._carried[lease.short] += 1

  def _fits_template(self, adapters: Adapters) -> bool:
    if self._template is None:
      return False
    fits = map_rows(
      lambda axis, x, mean: np.delete(x.shape, axis).tolist() == list(mean.shape), adapters, self._template
    )
    return all(jax.tree.leaves(fits))

  def state(self) -> tuple[dict, dict[str, np.ndarray]]:
    """What a restart needs: plain values and arrays."""
    arrays = {}
    for short, adapters in self._kept.items():
      arrays |= flatten(f"short{int(short)}", self._programs.adapters[short].fetch(adapters))
    if self._template is not None:
      arrays |= flatten("template", self._template)
    kept = {str(int(short)): [self._label[short], self._carried[short]] for short in self._kept}
    return {"made": self._made, "kept": kept}, arrays

  def restore(self, values: dict, arrays: dict[str, np.ndarray]) -> None:
    """Inverse of `state`."""
    self._made = values["made"]
    self._kept.clear()
    for name, (label, carried) in values["kept"].items():
      short = bool(int(name))
      self._kept[short] = self._programs.adapters[short].place(unflatten(f"short{name}", arrays))
      self._label[short], self._carried[short] = label, carried
    self._template = unflatten("template", arrays)

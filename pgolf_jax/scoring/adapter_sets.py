"""Which set of adapters a batch starts from, and what of it goes on to later batches.

A set of the full batch size is made at the start and after every global phase, one for short documents when they first
come (`TTT_SHORT_LORA_ENABLED`), and one for every batch of another size, which is used once. Full batches go on with
the A of the full batch before (`TTT_WARM_START_A`); without that, every document draws its own.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from pgolf_jax.model.adapters import Adapter, Adapters
from pgolf_jax.scoring.adapters import Learner, Matrices, map_rows
from pgolf_jax.scoring.compiled import Programs
from pgolf_jax.scoring.documents import Batch, Layout
from pgolf_jax.settings import Settings

Draw = Callable[[int, int], dict[str, np.ndarray]]
"""(number of the set, rank) → A by kind, on the host, with a row for each document of a batch, in batch order."""


@dataclasses.dataclass(frozen=True)
class AdapterSet:
  """A set of adapters between two batches.

  Attributes:
    matrices: its A, on the mesh.
    label: its number.
    batches: batches whose learning is in A.
  """

  matrices: Matrices
  label: str
  batches: int


class Start(NamedTuple):
  """What a batch starts from.

  Attributes:
    label: of the set that A comes from, or "mean".
    batches: batches whose learning is in A.
    goes_on: the set that later full batches go on with, its A donated to the learner; None where there is none.
  """

  learner: Learner
  label: str
  batches: int
  goes_on: AdapterSet | None


class AdapterSets:
  """The sets of one evaluation.

  Args:
    settings: of the evaluation; its seed is that of the drawn A.
    layout: rows of the batches.
    largest: documents of the largest batch.
    draw: A from elsewhere, in place of random ones.
  """

  def __init__(self, settings: Settings, layout: Layout, programs: Programs, *, largest: int, draw: Draw | None = None):
    self._has_full_batches = settings.ttt.lora.warm_start_a and largest == settings.ttt.batch_size
    self._ttt, self._layout, self._programs, self._draw = settings.ttt, layout, programs.adapters, draw
    self._key = jax.random.key(settings.seed)
    self._carried: dict[bool, AdapterSet] = {}  # by "short documents"
    self._mean: Adapters | None = None  # over documents and batches, on the host, without rows
    self._made = 0
    # Where no batch is full, the first set is made while the clock runs: its key's program is compiled here.
    jax.block_until_ready(jax.random.fold_in(self._key, 0))
    self.renew()

  def renew(self) -> None:
    """Forgets the carried sets and makes one of the full size."""
    self._carried.clear()
    if self._has_full_batches:
      self._carried[False] = self._make(False, range(self._ttt.batch_size))
    else:
      self._made += 1  # the reference makes the set, and uses it for nothing

  def _make(self, short: bool, ids: Sequence[int]) -> AdapterSet:
    """A new set; the i-th document of a batch draws by ids[i] alone, unless A comes from elsewhere."""
    programs, number = self._programs[short], self._made
    self._made += 1
    if self._draw is not None:
      given = self._draw(number, programs.spec.rule.rank)
      assert given["head"].shape[0] == len(ids), "a set has a row for each document"
      return AdapterSet(self._place(short, given), str(number), 0)
    key = jax.random.fold_in(self._key, number if self._ttt.lora.warm_start_a else 0)
    ids = self._layout.to_rows(np.array(ids, np.int32))
    return AdapterSet(programs.draw(key, programs.place_rows(ids)), str(number), 0)

  def start(self, batch: Batch) -> Start:
    """Returns adapters for a batch: A as the settings say, B zero, or both from the mean of earlier batches."""
    lora, short = self._ttt.lora, batch.is_short
    is_full = lora.warm_start_a and len(batch.documents) == self._ttt.batch_size
    if is_full and short in self._carried:
      adapters = self._carried.pop(short)
    else:
      ids = range(len(batch.documents)) if lora.warm_start_a else [d.index for d in batch.documents]
      adapters = self._make(short, ids)
    programs, goes_on = self._programs[short], adapters if is_full else None
    limit = self._ttt.short.doc_len if lora.warm_start_mean_doc_len is None else lora.warm_start_mean_doc_len
    if lora.warm_start_mean and batch.longest <= limit and self._mean_fits(short):
      rows = self._layout.rows
      every_row = jax.tree.map(lambda x: np.repeat(np.expand_dims(x, x.ndim - 2), rows, x.ndim - 2), self._mean)
      return Start(programs.begin(programs.place(every_row)), "mean", 1, goes_on)
    return Start(programs.begin_from_A(adapters.matrices), adapters.label, adapters.batches, goes_on)

  def needs_end(self, start: Start) -> bool:
    """Whether adapters after the batch matter to later ones."""
    return start.goes_on is not None or self._ttt.lora.warm_start_mean

  def finish(self, batch: Batch, start: Start, adapters: Adapters) -> None:
    """Keeps what later batches start from of the adapters after a batch."""
    if self._ttt.lora.warm_start_mean:
      host = self._fetch(batch.is_short, adapters, len(batch.documents))
      mean = map_rows(lambda axis, x: x.mean(axis), host)
      if self._mean_fits(batch.is_short):
        m = np.float32(self._ttt.lora.warm_start_mean_momentum)
        mean = jax.tree.map(lambda old, new: m * old + (1 - m) * new, self._mean, mean)
      self._mean = mean
    if start.goes_on is not None:
      matrices = {kind: adapter.A for kind, adapter in adapters.items()}
      self._carried[batch.is_short] = AdapterSet(matrices, start.goes_on.label, start.goes_on.batches + 1)

  def _mean_fits(self, short: bool) -> bool:
    return self._mean is not None and self._mean["head"].A.shape[-2] == self._programs[short].spec.rule.rank

  def _place(self, short: bool, host):
    """Host arrays in batch order on the mesh."""
    return self._programs[short].place(map_rows(lambda axis, x: self._layout.to_rows(x, axis), host))

  def _fetch(self, short: bool, tree, documents: int):
    """Inverse of `_place`."""
    host = self._programs[short].fetch(tree)
    return map_rows(lambda axis, x: self._layout.to_documents(x, documents, axis), host)

  def state(self) -> tuple[dict, dict[str, np.ndarray]]:
    """Returns what a restart needs, as plain values and arrays; rows are in batch order, whatever the devices are."""
    values, arrays = {"made": self._made, "carried": {}}, {}
    for short, adapters in self._carried.items():
      name = "short" if short else "full"
      values["carried"][name] = [adapters.label, adapters.batches]
      host = self._fetch(short, adapters.matrices, self._ttt.batch_size)
      arrays |= {f"{name}.{kind}.A": A for kind, A in host.items()}
    for kind, adapter in (self._mean or {}).items():
      arrays |= {f"mean.{kind}.A": adapter.A, f"mean.{kind}.B": adapter.B}
    return values, arrays

  def restore(self, values: dict, arrays: dict[str, np.ndarray]) -> None:
    """Inverse of `state`."""
    by_set: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for name, array in arrays.items():
      group, kind, letter = name.split(".")
      by_set.setdefault(group, {}).setdefault(kind, {})[letter] = array
    self._made = values["made"]
    self._carried.clear()
    for name, (label, batches) in values["carried"].items():
      short = name == "short"
      matrices = self._place(short, {kind: letters["A"] for kind, letters in by_set[name].items()})
      self._carried[short] = AdapterSet(matrices, label, batches)
    self._mean = {kind: Adapter(**letters) for kind, letters in by_set.get("mean", {}).items()} or None

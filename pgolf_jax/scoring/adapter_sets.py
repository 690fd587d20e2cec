"""Which sets of adapters a round's batches start from, and what of them goes on to later batches of their chains.

A set of the full batch size is made at the start and after every global phase, one for short documents when they first
come (`TTT_SHORT_LORA_ENABLED`), and one for every batch of another size, which is used once. Full batches go on with
the A of the full batch before in their chain (`TTT_WARM_START_A`); without that, every document draws its own.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from pgolf_jax.model.adapters import Adapter, Adapters
from pgolf_jax.scoring.adapters import Learner, Matrices, map_rows, row_axis
from pgolf_jax.scoring.compiled import Programs
from pgolf_jax.scoring.documents import Chains, Layout, Round, deal
from pgolf_jax.settings import Settings

Draw = Callable[[int, int], dict[str, np.ndarray]]
"""(number of the set, rank) → A by kind, on the host, with a row for each document of a batch, in batch order."""


class AdapterSet(NamedTuple):
  """A set of adapters between two batches: its number, and how many batches' learning is in its A."""

  label: str
  batches: int


class Carried(NamedTuple):
  """Sets of the chains of one group between two rounds: A on the mesh, and the set of each place that has one."""

  matrices: Matrices
  sets: dict[int, AdapterSet]


class Start(NamedTuple):
  """What a round starts from.

  Attributes:
    sets: that its batches' A come from; labelled "mean" where it is the mean of earlier ones.
    goes_on: the sets, by place, that later full batches go on with.
    kept: sets that the round does not touch.
  """

  learner: Learner
  sets: list[AdapterSet]
  goes_on: dict[int, AdapterSet]
  kept: Carried | None


class AdapterSets:
  """The sets of one evaluation.

  Args:
    settings: of the evaluation; its seed is that of the drawn A.
    layout: rows of the rounds.
    largest: documents of the largest batch.
    draw: A from elsewhere, in place of random ones.
  """

  def __init__(
    self,
    settings: Settings,
    layout: Layout,
    programs: Programs,
    chains: Chains,
    *,
    largest: int,
    draw: Draw | None = None,
  ):
    self._has_full_batches = settings.ttt.lora.warm_start_a and largest == settings.ttt.batch_size
    self._ttt, self._layout, self._programs, self._draw = settings.ttt, layout, programs.adapters, draw
    self._chains, self._width = chains
    self._key = jax.random.key(settings.seed)
    self._carried: dict[tuple[bool, int], Carried] = {}  # by "short documents" and group
    self._mean: Adapters | None = None  # over documents and batches, on the host, without rows
    self._made = 0
    self.renew()

  def renew(self) -> None:
    """Forgets the carried sets and makes one of the full size for each chain."""
    self._carried.clear()
    if not self._has_full_batches:
      self._made += 1  # the reference makes the set, and uses it for nothing
      return
    for first in range(0, self._chains, self._width):
      places = range(min(self._width, self._chains - first))
      made = self._make(False, {place: range(self._ttt.batch_size) for place in places})
      self._carried[False, first // self._width] = Carried(*made)

  def _make(self, short: bool, ids: dict[int, Sequence[int]]) -> tuple[Matrices, dict[int, AdapterSet]]:
    """New sets by place; the i-th document of a batch draws by ids[place][i] alone, unless A comes from elsewhere."""
    programs, numbers = self._programs[short], dict(zip(ids, range(self._made, self._made + len(ids)), strict=True))
    self._made += len(ids)
    sets = {place: AdapterSet(str(number), 0) for place, number in numbers.items()}
    place_n = deal({place: len(x) for place, x in ids.items()}, self._width)
    if self._draw is not None:
      given = [self._draw(number, programs.spec.rule.rank) for number in numbers.values()]
      assert [x["head"].shape[0] for x in given] == [*map(len, ids.values())], "a set has a row for each document"
      whole = map_rows(lambda axis, *xs: np.concatenate(xs, axis), *given)
      return self._place(short, whole, place_n), sets
    set_n = [numbers[place] if self._ttt.lora.warm_start_a else 0 for place, x in ids.items() for _ in x]
    id_n = [i for x in ids.values() for i in x]
    rows = (programs.place_rows(self._layout.to_rows(np.array(x, np.int32), place_n)) for x in (set_n, id_n))
    return programs.draw(self._key, *rows), sets

  def start(self, round_: Round) -> Start:
    """Returns adapters for a round: A as the settings say, B zero, or both from the mean of earlier batches."""
    lora, short = self._ttt.lora, round_.is_short
    programs, carried = self._programs[short], self._carried.get((short, round_.group))
    by_place = dict(zip(round_.places, round_.batches, strict=True))
    full = [at for at, batch in by_place.items() if lora.warm_start_a and len(batch.documents) == self._ttt.batch_size]
    known = {at: carried.sets[at] for at in full if carried and at in carried.sets}
    ids = {
      at: range(len(batch.documents)) if lora.warm_start_a else [d.index for d in batch.documents]
      for at, batch in by_place.items()
      if at not in known
    }
    matrices, sets = self._make(short, ids) if ids else (carried.matrices, {})
    kept = carried if carried and len(known) < len(carried.sets) else None
    if known and (ids or kept):  # a copy even without new sets: what it starts from is donated
      matrices = programs.select(self._rows_at(known), carried.matrices, matrices)
    sets |= known
    goes_on = {at: sets[at] for at in full}
    limit = self._ttt.short.doc_len if lora.warm_start_mean_doc_len is None else lora.warm_start_mean_doc_len
    if lora.warm_start_mean and round_.batches[0].longest <= limit and self._mean_fits(short):
      rows = self._layout.rows
      every_row = jax.tree.map(lambda x: np.repeat(np.expand_dims(x, x.ndim - 2), rows, x.ndim - 2), self._mean)
      return Start(programs.begin(programs.place(every_row)), [AdapterSet("mean", 1)], goes_on, kept)
    return Start(programs.begin_from_A(matrices), [sets[at] for at in round_.places], goes_on, kept)

  def _rows_at(self, places: Iterable[int]) -> jax.Array:
    """Which rows hold documents of the batches at these places of a round."""
    return self._programs[False].place_mask(np.isin(self._layout.place_of_rows() % self._width, list(places)))

  def needs_end(self, start: Start) -> bool:
    """Whether adapters after the round matter to later ones."""
    return bool(start.goes_on) or self._ttt.lora.warm_start_mean

  def finish(self, round_: Round, start: Start, adapters: Adapters) -> None:
    """Keeps what later batches start from of the adapters after a round."""
    short = round_.is_short
    if self._ttt.lora.warm_start_mean:
      rows, host = self._layout.rows_of(round_.place_n), self._programs[short].fetch(adapters)
      mean = map_rows(lambda axis, x: np.take(x, rows, axis).mean(axis), host)
      if self._mean_fits(short):
        m = np.float32(self._ttt.lora.warm_start_mean_momentum)
        mean = jax.tree.map(lambda old, new: m * old + (1 - m) * new, self._mean, mean)
      self._mean = mean
    if start.goes_on:
      matrices = {kind: adapter.A for kind, adapter in adapters.items()}
      sets = {at: AdapterSet(label, uses + 1) for at, (label, uses) in start.goes_on.items()}
      if start.kept:
        matrices = self._programs[short].select(self._rows_at(sets), matrices, start.kept.matrices)
        sets = start.kept.sets | sets
      self._carried[short, round_.group] = Carried(matrices, sets)

  def _mean_fits(self, short: bool) -> bool:
    return self._mean is not None and self._mean["head"].A.shape[-2] == self._programs[short].spec.rule.rank

  def _place(self, short: bool, host, place_n: np.ndarray):
    """Host arrays of documents on the mesh, in the rows of their places."""
    return self._programs[short].place(map_rows(lambda axis, x: self._layout.to_rows(x, place_n, axis), host))

  def _places(self, places: Iterable[int]) -> np.ndarray:
    """Where the documents of full batches at these places of a round stand, batch for batch."""
    return deal(dict.fromkeys(places, self._ttt.batch_size), self._width)

  def state(self) -> tuple[dict, dict[str, np.ndarray]]:
    """Returns what a restart needs, as plain values and arrays, by chain; rows are in batch order."""
    values, arrays = {"made": self._made, "carried": {}}, {}
    for (short, group), (matrices, sets) in self._carried.items():
      host = self._programs[short].fetch(matrices)
      for at, each in sets.items():
        name = f"{'short' if short else 'full'}-{group * self._width + at}"
        values["carried"][name] = each
        rows = self._layout.rows_of(self._places([at]))
        arrays |= {f"{name}.{kind}.A": np.take(A, rows, row_axis(A)) for kind, A in host.items()}
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
    groups: dict[tuple[bool, int], dict[int, tuple]] = {}
    for name, each in values["carried"].items():
      kind, chain = name.split("-")
      group, at = divmod(int(chain), self._width)
      matrices = {kind: letters["A"] for kind, letters in by_set[name].items()}
      groups.setdefault((kind == "short", group), {})[at] = (AdapterSet(*each), matrices)
    for key, each in groups.items():
      whole = map_rows(lambda axis, *xs: np.concatenate(xs, axis), *(matrices for _, matrices in each.values()))
      matrices = self._place(key[0], whole, self._places(each))
      self._carried[key] = Carried(matrices, {at: carried for at, (carried, _) in each.items()})
    self._mean = {kind: Adapter(**letters) for kind, letters in by_set.get("mean", {}).items()} or None

"""`pgolf bench kernels`: each accelerated operation, by every backend that is possible here and by PyTorch."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pgolf_jax.bench import harness
from pgolf_jax.bench.harness import Measurement, Way, Work
from pgolf_jax.bench.pytorch import torch_gpt_on
from pgolf_jax.kernels import Choice, softcapped_xent
from pgolf_jax.kernels import chunk_attention as chunk
from pgolf_jax.kernels import gated_xsa as xsa
from pgolf_jax.kernels import leaky_relu2_mlp as mlp
from pgolf_jax.kernels import polar_express as polar
from pgolf_jax.kernels import residual_norm as norm
from pgolf_jax.kernels import rotary_heads as rotary
from pgolf_jax.kernels import segment_attention as attention
from pgolf_jax.kernels import softcapped_xent as xent
from pgolf_jax.kernels.hardware import peaks, target
from pgolf_jax.runtime import distributed

Operation = Literal[
  "residual_norm",
  "rotary_heads",
  "segment_attention",
  "chunk_attention",
  "gated_xsa",
  "leaky_relu2_mlp",
  "softcapped_xent",
  "linear_softcapped_xent",
  "polar_express",
]

CAP = 30.0
SLOPE = 0.3
CHUNK = 64
"""Targets between two updates of test-time training."""
MEAN_DOCUMENT = 957
"""Tokens of a validation document, on average."""


def kernels(
  operations: tuple[Operation, ...] = (),
  tokens: int | None = None,
  max_segment: int = 2048,
  repeats: int = 10,
  noise: bool = False,
) -> None:
  """Time the accelerated operations at the record's widths, forward alone and with the gradient.

  FLOP/s count the products that the operation needs, bytes/s the arrays that it must read or write; the roofline is the
  longer of the two times at the chip's peak rates, as a share of the measured time. Every backend, and PyTorch where it
  is installed, is compared with plain XLA.

  Example: pgolf bench kernels --operations leaky_relu2_mlp --tokens 8192

  Args:
    operations: which ones; all if none is given.
    tokens: of one device's micro-batch; 98304 if not given, 2048 on a CPU.
    max_segment: tokens of the longest segment; documents are about 957 tokens long.
    repeats: timed turns, each of as many calls as take some 10 ms.
    noise: time plain XLA twice, to show which differences mean nothing.
  """
  distributed.start()
  columns = {**harness.MILLISECONDS, **harness.RATES, **harness.ROOFLINE, **harness.COMPARISON}
  measurements, notes = measure(operations, tokens, max_segment, repeats, noise)
  harness.show("accelerated operations", measurements, columns, notes)


def measure(
  operations: tuple[Operation, ...], tokens: int | None, max_segment: int, repeats: int, noise: bool = False
) -> tuple[list[Measurement], list[str]]:
  """Returns the table's rows, and notes: on the sizes, and on each backend that was left out."""
  here = target()
  on_cpu = here.platform == "cpu"
  tokens = tokens or (2048 if on_cpu else 98304)
  matrices, dtype = (2, jnp.float32) if on_cpu else (22, jnp.bfloat16)
  sizes = f"{tokens} tokens in segments up to {max_segment}, {matrices} matrices, {dtype.__name__}"
  notes = [f"{here.kind}: {sizes}", harness.describe_peaks(here.kind)]
  pytorch, obstacle = torch_gpt_on(here.platform)
  if pytorch is None:
    notes.append(f"PyTorch was left out: {obstacle}")
  measurements = []
  start_BxT = segment_starts(tokens, max_segment)[None]
  for case in cases(start_BxT, max_segment, dtype, RECORD._replace(matrices=matrices)):
    if operations and case.name not in operations:
      continue
    possible, obstacles = case.backends()
    notes += obstacles
    for gradient in case.passes:
      ways = [case.jax_way(backend, gradient) for backend in possible]
      if pytorch is not None:
        ways.append(case.torch_way(pytorch, gradient))
      rows, left_out = harness.measure(ways, repeats, warmups=2, group_s=0.01, noise=noise)
      measurements += rows
      notes += left_out
  return measurements, notes


@dataclasses.dataclass(frozen=True)
class Case:
  """One operation on one set of arguments.

  Attributes:
    name: of the operation, as in pgolf_jax.kernels.
    arguments: arrays.
    call: (*arguments, implementation) → result, or several in a tuple.
    choose: (implementation) → Choice; raises ValueError where it is not possible.
    torch: (module torch_gpt, *arguments as tensors) → result.
    flops, num_bytes: of the forward pass, and of forward and gradient: products that the operation needs, whose
      repetitions within an implementation (scores that a gradient computes anew) do not count, and arrays that it must
      read or write.
    differentiated: positions of the arguments that get a gradient.
  """

  name: str
  arguments: tuple[jax.Array, ...]
  call: Callable[..., jax.Array]
  choose: Callable[..., Choice]
  torch: Callable[..., Any]
  flops: tuple[float, float]
  num_bytes: tuple[float, float]
  differentiated: tuple[int, ...]

  @property
  def shapes(self) -> str:
    """The class of shapes for which one measurement of block sizes holds: widths and type, whatever the tokens."""
    widths = ", ".join("×".join(map(str, x.shape[-2:] if x.ndim > 2 else x.shape[-1:])) for x in self.arguments[:3])
    return f"{widths} {self.arguments[0].dtype}"

  @property
  def passes(self) -> tuple[bool, ...]:
    """Whether with the gradient, of every pass that there is."""
    return (False, True) if self.differentiated else (False,)

  def backends(self) -> tuple[list[str], list[str]]:
    """Returns the backends that are possible here, plain XLA first, and why the others are not."""
    possible, obstacles = [], []
    for backend in ("xla", "mosaic_gpu", "mosaic_tpu"):
      try:
        self.choose(implementation=backend)
        possible.append(backend)
      except ValueError as e:
        obstacles.append(str(e))
    return possible, obstacles

  def jax_way(self, backend: str, gradient: bool) -> Way:
    """A backend, to be timed."""
    return Way(self._labels(gradient, backend), partial(self.jax_call, backend, gradient), self._work(gradient))

  def torch_way(self, pytorch: ModuleType, gradient: bool) -> Way:
    """PyTorch on the same kind of device, to be timed."""
    platform = target().platform
    prepare = partial(self.torch_call, pytorch, platform, gradient)
    labels, wait = self._labels(gradient, "PyTorch"), lambda _: pytorch.synchronize(platform)
    return Way(labels, prepare, self._work(gradient), wait)

  def _work(self, gradient: bool) -> Work:
    return Work(flops=self.flops[gradient], num_bytes=self.num_bytes[gradient], peaks=peaks(target().kind))

  def _labels(self, gradient: bool, by: str) -> dict[str, str]:
    return {"operation": self.name, "pass": "forward + gradient" if gradient else "forward", "by": by}

  def jax_call(self, implementation: str, gradient: bool) -> Callable[[], Any]:
    """A call of one backend: its result, or its result and the gradients from `cotangents`.

    Both are handed back, and what the gradients begin with is an argument: else XLA would leave out the forward pass
    as far as no gradient needs it, and compute with the constants of a sum.
    """
    forward = partial(self.call, implementation=implementation)
    if not gradient:
      return partial(jax.jit(forward), *self.arguments)

    def both(cotangents, *arguments):
      def of_inputs(*inputs):
        given = dict(zip(self.differentiated, inputs, strict=True))
        return forward(*(given.get(i, x) for i, x in enumerate(arguments)))

      result, backward = jax.vjp(of_inputs, *(arguments[i] for i in self.differentiated))
      return result, backward(cotangents)

    return partial(jax.jit(both), self.cotangents(), *self.arguments)

  def cotangents(self) -> Any:
    """Random arrays of the result's shapes and types, which gradients begin with."""
    results = jax.eval_shape(partial(self.call, implementation="xla"), *self.arguments)
    return jax.tree.map(lambda x: jax.random.normal(jax.random.key(7), x.shape, x.dtype), results)

  def torch_call(self, pytorch: ModuleType, platform: str, gradient: bool) -> Callable[[], Any]:
    """The same in PyTorch."""
    tensors = [pytorch.tensor(x, platform) for x in self.arguments]
    inputs = [tensors[i].requires_grad_(gradient) for i in self.differentiated]
    forward = partial(self.torch, pytorch, *tensors)
    if not gradient:
      return forward
    with pytorch.torch.no_grad():  # for shapes and types, in which PyTorch's results may differ
      pairs = zip(jax.tree.leaves(forward()), jax.tree.leaves(self.cotangents()), strict=True)
      cotangents = [pytorch.tensor(x, platform).reshape(like.shape).to(like.dtype) for like, x in pairs]

    def both():
      result = forward()
      return result, pytorch.torch.autograd.grad(result, inputs, cotangents)

    return both


def document_lengths(tokens: int, seed: int = 0) -> np.ndarray:
  """Lengths of documents, in tokens, that fill at least `tokens`, as long as those of the validation set are.

  Log-normal with the mean 957 and the median 621, from 40 to 46,000 tokens: queries at segments of 1024, 2048 and 3072
  tokens then see 413, 655 and 800 keys on average, those of the validation set 412, 649 and 817.
  """
  spread = 0.93
  middle = np.log(MEAN_DOCUMENT) - spread**2 / 2
  lengths = np.random.default_rng(seed).lognormal(middle, spread, size=16 + 4 * tokens // MEAN_DOCUMENT)
  return np.clip(lengths, 40, 46_000).astype(int)


def segment_starts(tokens: int, max_segment: int, lengths: Sequence[int] | None = None) -> np.ndarray:
  """First positions of the segments of a row, which are documents cut at `max_segment` tokens.

  Args:
    lengths: of the row's documents, which fill it; as long as real ones if not given.
  """
  begins = np.cumsum(document_lengths(tokens) if lengths is None else lengths)
  position = np.arange(tokens)
  document = np.concatenate([[0], begins])[np.searchsorted(begins, position, side="right")]
  return (position - (position - document) % max_segment).astype(np.int32)


class Sizes(NamedTuple):
  """Sizes of the arrays that operations are given.

  Attributes:
    D, F, V, H, K, C: width, MLP width, vocabulary, query heads, key and value heads, head width.
    matrices: of the bank that is orthogonalised.
  """

  D: int
  F: int
  V: int
  H: int
  K: int
  C: int
  matrices: int


RECORD = Sizes(D=512, F=2048, V=8192, H=8, K=4, C=64, matrices=22)


def cases(start_BxT: np.ndarray, max_segment: int, dtype, sizes: Sizes = RECORD) -> Iterator[Case]:
  """All operations on rows with these segments, in the order in which a step meets them.

  Args:
    start_BxT: where each token's segment begins in its row.
    max_segment: tokens of the longest segment.
    dtype: of all arrays but integers.
  """
  D, F, V, H, K, C, matrices = sizes
  B, T = start_BxT.shape
  tokens = B * T
  keys = iter(jax.random.split(jax.random.key(0), 24))
  size = jnp.dtype(dtype).itemsize
  caps = {"cap_pos": CAP, "cap_neg": CAP}

  def normal(*shape, scale=1.0):
    return (scale * jax.random.normal(next(keys), shape)).astype(dtype)

  lane = normal(B, T, D), normal(B, T, D), jnp.linspace(-1.0, 1.0, D), jnp.linspace(1.0, 2.0, D)
  yield Case(
    "residual_norm",
    lane,
    partial(norm.residual_norm, scale=0.5),
    partial(norm.OPERATION.choose, *lane, scale=0.5),
    lambda torch, *arguments: torch.residual_norm(*arguments, 0.5),
    (0, 0),
    (4 * size * tokens * D, 10 * size * tokens * D),
    (0, 1, 2, 3),
  )
  qkv, gain = normal(B, T, (H + 2 * K) * C), jnp.linspace(1.0, 2.0, H)
  pairs = C // 8  # that rotary positions turn
  angle = jnp.arange(T)[:, None] * 1e4 ** (-jnp.arange(pairs) / pairs)
  num_bytes = tokens * 2 * size * (H + 2 * K) * C + T * 4 * 2 * pairs
  yield Case(
    "rotary_heads",
    (qkv, gain, jnp.cos(angle), jnp.sin(angle)),
    partial(rotary.rotary_heads, kv_heads=K),
    partial(rotary.OPERATION.choose, qkv, gain, jnp.cos(angle), jnp.sin(angle), kv_heads=K),
    lambda torch, *arguments: torch.rotary_heads(*arguments, K),
    (0, 0),
    (num_bytes, 2 * num_bytes + size * tokens * (H + 2 * K) * C),
    (0, 1),
  )
  q, k, v = normal(B, T, H, C), normal(B, T, K, C), normal(B, T, K, C)
  start = start_BxT.astype(np.int32)
  lengths = tuple(np.unique(start + T * np.arange(B)[:, None], return_counts=True)[1].tolist())
  pairs = float((np.arange(T) - start + 1).sum())
  num_bytes = size * tokens * C * (2 * H + 2 * K)
  yield Case(
    "segment_attention",
    (q, k, v, jnp.asarray(start)),
    partial(attention.segment_attention, max_segment=max_segment),
    partial(attention.OPERATION.choose, q, k, v, start, max_segment=max_segment),
    lambda torch, q, k, v, start: torch.segment_attention(*(x.flatten(0, 1) for x in (q, k, v)), lengths),
    (4 * pairs * H * C, 12 * pairs * H * C),
    (num_bytes, 3 * num_bytes),
    (0, 1, 2),
  )
  yield _chunk_attention(normal, max(1, tokens // max_segment), max_segment, sizes)
  gate = normal(B, T, H)
  yield Case(
    "gated_xsa",
    (q, v, gate),
    partial(xsa.gated_xsa, scale=0.5),
    partial(xsa.OPERATION.choose, q, v, gate, scale=0.5),
    lambda torch, *arguments: torch.gated_xsa(*arguments, 0.5),
    (0, 0),
    (size * tokens * (2 * H * C + K * C + H), size * tokens * (5 * H * C + 3 * K * C + 3 * H)),
    (0, 1, 2),
  )
  x, up, down = normal(tokens, D), normal(F, D, scale=D**-0.5), normal(D, F, scale=F**-0.5)
  yield Case(
    "leaky_relu2_mlp",
    (x, up, down),
    partial(mlp.leaky_relu2_mlp, slope=SLOPE),
    partial(mlp.OPERATION.choose, x, up, down, slope=SLOPE),
    lambda torch, *arguments: torch.leaky_relu2_mlp(*arguments, SLOPE),
    (4 * tokens * D * F, 12 * tokens * D * F),
    (size * (2 * tokens * D + 2 * D * F), size * (5 * tokens * D + 6 * D * F)),
    (0, 1, 2),
  )
  z, y_N = normal(tokens, V, scale=5.0), jax.random.randint(next(keys), (tokens,), 0, V)
  yield Case(
    "softcapped_xent",
    (z, y_N),
    partial(xent.softcapped_xent, **caps),
    partial(xent.OPERATION.choose, z, y_N, None, **caps),
    lambda torch, *arguments: torch.softcapped_xent(*arguments, CAP),
    (0, 0),
    (size * z.size, 3 * size * z.size),
    (0,),
  )
  weight = normal(V, D, scale=0.05)
  n = softcapped_xent.block_size(tokens, V)
  block = jax.ShapeDtypeStruct((n, V), dtype), jax.ShapeDtypeStruct((n,), y_N.dtype)
  num_bytes = size * (tokens * D + V * D)
  yield Case(
    "linear_softcapped_xent",
    (x, weight, y_N),
    partial(xent.linear_softcapped_xent, **caps),
    partial(xent.OPERATION.choose, *block, None, **caps),
    lambda torch, x, weight, y_N: torch.softcapped_xent(x @ weight.T, y_N, CAP),
    (2 * tokens * D * V, 6 * tokens * D * V),
    (num_bytes, 3 * num_bytes),
    (0, 1),
  )
  bank = normal(matrices, D, F)
  yield Case(
    "polar_express",
    (bank,),
    polar.polar_express,
    partial(polar.OPERATION.choose, bank, steps=5),
    lambda torch, bank: torch.polar_express(bank),
    (5 * matrices * (4 * D * D * F + 2 * D**3), 0),
    (2 * size * bank.size, 0),
    (),
  )


def _chunk_attention(normal: Callable[..., jax.Array], documents: int, window: int, sizes: Sizes) -> Case:
  """A chunk of each document whose window is full: it sees all of the ring but what it will overwrite."""
  (H, K, C), B, X, S = sizes[3:6], documents, min(CHUNK, window), window
  arrays = normal(B, X, H, C), normal(B, X, K, C), normal(B, X, K, C), normal(1, K, B, S, C), normal(1, K, B, S, C)

  def to_arguments(q, k, v, ring_k, ring_v):
    place = chunk.Place(*(jnp.int32(n) for n in (0, S, X)))
    return q, k, v, chunk.KeysValues(ring_k, ring_v), place

  earlier, own = float(B * X * (S - X)), B * X * (X + 1) / 2
  size = arrays[0].dtype.itemsize
  ring_bytes, chunk_bytes = size * 2 * B * S * K * C, size * 2 * B * X * (H + K) * C
  return Case(
    "chunk_attention",
    arrays,
    lambda *x, **options: chunk.chunk_attention(*to_arguments(*x), window=S, **options),
    partial(chunk.OPERATION.choose, *to_arguments(*arrays), window=S),
    lambda torch, *tensors: torch.chunk_attention(*tensors),
    (4 * (earlier + own) * H * C, (8 * earlier + 12 * own) * H * C),
    (ring_bytes + chunk_bytes, 2 * ring_bytes + 3 * chunk_bytes),
    (0, 1, 2),
  )


COMMAND = kernels

"""What takes the place of Triton, FlashAttention, bfloat16 and CUDA while someone's PyTorch script is imported and run.

FlashAttention has no float32 and Triton no CPU, so both are replaced everywhere, on a GPU too, by plain PyTorch of the
same meaning. Each replacement that is in use is named in `Places.used`, with what stands in its place.
"""

import contextlib
import dataclasses
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo
import torch._inductor  # both look for the real Triton, so they are imported before it is hidden
import torch.nn.functional as F

from pgolf_jax.bench.torch_gpt import segment_attention
from pgolf_jax.errors import UserError

observers: list[Callable[..., None]] = []
"""Called with what attention within segments reads and returns: q, k, v and attend."""


def attention(q, k, v, *args, causal: bool = False, softmax_scale=None, window_size=(-1, -1), **_):
  """FlashAttention's `flash_attn_func`: attention over whole rows, [B, T, H, C]; fewer key heads are shared out."""
  _refuse_other_attention(args, softmax_scale, window_size)
  q, k, v = (x.transpose(1, 2) for x in (q, k, v))
  return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)


def packed_attention(q, k, v, *args, cu_seqlens_q=None, causal: bool = False, **options):
  """FlashAttention's `flash_attn_varlen_func`: attention within segments that stand end to end, [T, H, C].

  `cu_seqlens_q` may end in repetitions of the last boundary, which are empty segments.
  """
  boundaries = args[0] if cu_seqlens_q is None and args else cu_seqlens_q
  _refuse_other_attention(args[5:], options.get("softmax_scale"), options.get("window_size", (-1, -1)))
  if not causal:
    raise UserError("The script calls flash_attn_varlen_func without causal=True, which no kind of case has.")
  y = segment_attention(q, k, v, tuple(n for n in boundaries.diff().tolist() if n > 0))
  for observe in observers:
    observe(q=q, k=k, v=v, attend=y)
  return y


def _refuse_other_attention(args, softmax_scale, window_size) -> None:
  if args or softmax_scale is not None or tuple(window_size) != (-1, -1):
    raise UserError(
      "The script calls FlashAttention with a softmax scale, a window or further positional arguments; the stand-in "
      "knows full windows and the scale 1/√(head width) only."
    )


def log_softmax_gather(logits, target_ids, hint_ids):
  """The script's fused kernel of that work: log-probabilities of targets and of hints, float32, [B, T] each."""
  log_probs = torch.log_softmax(logits.float(), -1)
  return tuple(log_probs.gather(-1, ids[..., None]).squeeze(-1) for ids in (target_ids, hint_ids))


class Placeholder:
  """Anything of Triton's: it may be named, called and used as a decorator, but kernels cannot be launched."""

  def __init__(self, name: str):
    self.name = name

  def __getattr__(self, name: str) -> "Placeholder":
    if name.startswith("__"):
      raise AttributeError(name)
    return Placeholder(f"{self.name}.{name}")

  def __call__(self, *args, **_) -> Any:
    if len(args) == 1 and isinstance(args[0], types.FunctionType):
      return Placeholder(args[0].__name__)  # `@triton.jit`
    if len(args) == 1 and isinstance(args[0], Placeholder):
      return args[0]  # `@triton.autotune(…)` over it
    return self

  def __getitem__(self, _):
    raise UserError(
      f"The script launches the Triton kernel {self.name}, for which there is no stand-in; switch it off with the "
      "script's own setting, as in --set FUSED_CE_ENABLED=0, or write the same in PyTorch."
    )


class _HiddenModule(types.ModuleType):
  """A module of Triton or FlashAttention that is not there."""

  __path__: tuple[str, ...] = ()

  def __getattr__(self, name: str):
    if name.startswith("__"):
      raise AttributeError(name)
    if self.__name__.startswith("triton"):
      return Placeholder(name)
    known = {"flash_attn_func": attention, "flash_attn_varlen_func": packed_attention}
    if name not in known:
      raise AttributeError(f"the stand-in for FlashAttention has no {name}")
    return known[name]


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  """Finds the hidden modules, before any that are installed."""

  HIDDEN = ("triton", "flash_attn", "flash_attn_interface")

  def find_spec(self, fullname, path=None, target=None):
    if fullname.split(".")[0] in self.HIDDEN:
      return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
    return None

  def create_module(self, spec):
    return _HiddenModule(spec.name)

  def exec_module(self, module) -> None:
    """Has nothing to execute."""


def _identity_compile(model=None, **_):
  """`torch.compile` in each of its forms, without compiling."""
  return (lambda function: function) if model is None else model


class _NoStream:
  """A CUDA stream, or the context of one, where everything happens in order."""

  def wait_stream(self, _) -> None:
    """Has nothing to wait for."""

  def synchronize(self) -> None:
    """Has nothing to wait for."""

  def __enter__(self):
    return self

  def __exit__(self, *_) -> None:
    """Leaves nothing."""


class _Torch(types.ModuleType):
  """The script's `torch`: float32 for bfloat16, one device, no autocast, no pinned memory."""

  def __init__(self, device: str):
    super().__init__("torch")
    self.bfloat16 = torch.float32
    self.autocast = lambda *_, **__: contextlib.nullcontext()
    self.compile = _identity_compile
    for name in ("empty", "zeros", "ones", "full", "tensor", "empty_like", "zeros_like"):
      setattr(self, name, _unpinned(getattr(torch, name)))
    if device == "cpu":
      self.device = lambda *_, **__: torch.device(device)
      self.cuda = types.SimpleNamespace(
        **{name: lambda *_, **__: _NoStream() for name in ("Stream", "current_stream", "default_stream", "stream")},
        **{name: lambda *_, **__: None for name in ("synchronize", "empty_cache", "manual_seed_all", "set_device")},
        **{name: lambda *_, **__: 0 for name in ("max_memory_allocated", "max_memory_reserved", "current_device")},
        is_available=lambda: False,
        device_count=lambda: 0,
      )

  def __getattr__(self, name: str):
    return getattr(torch, name)


def _unpinned(function):
  return lambda *args, pin_memory=False, **kwargs: function(*args, **kwargs)


@dataclasses.dataclass
class Places:
  """The replacements in one process.

  Attributes:
    device: "cpu" or "cuda".
    used: what was replaced → what stands in its place.
  """

  device: str
  used: dict[str, str] = dataclasses.field(default_factory=dict)

  @contextlib.contextmanager
  def hidden_packages(self) -> Iterator[None]:
    """Within it, imports of Triton and FlashAttention give the stand-ins; afterwards they are as before."""
    finder, before = _Finder(), {name: module for name, module in sys.modules.items() if _is_hidden(name)}
    for name in before:
      del sys.modules[name]
    sys.meta_path.insert(0, finder)
    try:
      yield
    finally:
      sys.meta_path.remove(finder)
      for name in [name for name in sys.modules if _is_hidden(name)]:
        root = name.split(".")[0]
        self.used[root] = (
          "kernels that are named but never launched"
          if root == "triton"
          else "scaled_dot_product_attention, segment by segment"
        )
        del sys.modules[name]
      sys.modules.update(before)

  @contextlib.contextmanager
  def in_float32(self) -> Iterator[None]:
    """Within it, PyTorch compiles nothing, pins no memory, and what is turned to bfloat16 becomes float32."""
    replaced = [
      (torch, "compile", _identity_compile),
      (torch.Tensor, "bfloat16", lambda tensor, *_, **__: tensor.float()),
      (torch.nn.Module, "bfloat16", lambda module: module.float()),
      (torch.Tensor, "pin_memory", lambda tensor, *_, **__: tensor),
    ]
    before = [getattr(owner, name) for owner, name, _ in replaced]
    precision = torch.get_float32_matmul_precision()
    for owner, name, value in replaced:
      setattr(owner, name, value)
    torch.set_float32_matmul_precision("highest")
    self.used["torch.compile"] = "nothing is compiled"
    self.used["bfloat16 and autocast"] = "float32 throughout"
    try:
      yield
    finally:
      torch.set_float32_matmul_precision(precision)
      for (owner, name, _), value in zip(replaced, before, strict=True):
        setattr(owner, name, value)

  def enter(self, module: types.ModuleType) -> None:
    """Replaces names of an imported script."""
    module.torch = _Torch(self.device)
    if self.device == "cpu":
      self.used["torch.cuda"] = "the CPU, in order"
    if getattr(module, "BOS_ID", 1) is None:
      module.BOS_ID = 1
    self.replace(module, "fused_log_softmax_dual_gather", log_softmax_gather, "log_softmax and gather")

  def replace(self, owner, name: str, value, meaning: str) -> None:
    """Replaces an attribute, if there is one of that name."""
    if hasattr(owner, name):
      setattr(owner, name, value)
      self.used[name] = meaning

  def without_fused_mlp(self, model: torch.nn.Module) -> None:
    """Keeps every module that has a switch `use_fused` on its plain path, whatever sets it later."""
    for kind in {type(module) for module in model.modules() if hasattr(module, "use_fused")}:
      kind.use_fused = property(lambda _: False, lambda _, __: None)
      self.used[f"{kind.__name__}.use_fused"] = "the script's own unfused path"


def _is_hidden(name: str) -> bool:
  return name.split(".")[0] in _Finder.HIDDEN


@contextlib.contextmanager
def recorded(model: torch.nn.Module, layers: list[int]) -> Iterator[dict[str, torch.Tensor]]:
  """Gives a dictionary that the activations of one forward pass of one row are entered in, each [T, …].

  Their names are those of `model.Context.tap`.

  What attention reads and returns is always seen; the rest as far as the model has modules `blocks`, called with the
  residual lane and the embedding, with `attn` and `mlp` in each, `final_norm`, or a method `_parallel_block` that
  returns both lanes.

  Args:
    layers: in the order in which they run.
  """
  found: dict[str, torch.Tensor] = {}
  uses = 0  # of layers so far

  def note(name: str, value) -> None:
    found[f"{uses - 1:02d}.blocks.{layers[uses - 1]}.{name}"] = value.detach()

  def attended(**values) -> None:
    nonlocal uses
    uses += 1
    for name, value in values.items():
      note(name, value)

  def hook(name: str):
    return lambda _, __, output: note(name, output[0])

  def begun(_, args) -> None:  # a block reads the residual lane, and the normed embedding
    if len(args) > 1:
      found.setdefault("embedding", args[1][0].detach())

  handles = []
  blocks = getattr(model, "blocks", None)
  for block in blocks if isinstance(blocks, torch.nn.ModuleList) else ():
    handles.append(block.register_forward_pre_hook(begun))
    handles.append(block.register_forward_hook(hook("x")))
    handles += [
      getattr(block, name).register_forward_hook(hook(name)) for name in ("attn", "mlp") if hasattr(block, name)
    ]
  if hasattr(model, "final_norm"):
    handles.append(model.final_norm.register_forward_hook(lambda _, __, output: found.update(hidden=output[0])))
  parallel = getattr(model, "_parallel_block", None)
  if parallel is not None:

    def lanes_noted(*args, **kwargs):
      lanes = parallel(*args, **kwargs)
      for name, lane in zip(("lane0", "lane1"), lanes, strict=True):
        note(name, lane[0])
      return lanes

    model._parallel_block = lanes_noted
  observers.append(attended)
  try:
    yield found
  finally:
    observers.remove(attended)
    if parallel is not None:
      del model._parallel_block
    for handle in handles:
      handle.remove()

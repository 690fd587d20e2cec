"""Where PyTorch is: it is optional, and takes seconds to import."""

from types import ModuleType


def torch_gpt_on(platform: str) -> tuple[ModuleType | None, str]:
  """Returns (the module `torch_gpt`, "") or (None, why PyTorch cannot be timed beside JAX on this platform)."""
  try:
    from pgolf_jax.bench import torch_gpt
  except ImportError:
    return None, "it is not installed; pip install 'pgolf_jax[torch]' adds it"
  if platform not in torch_gpt.platforms():
    return None, f"this PyTorch does not compute on a {platform}"
  return torch_gpt, ""

"""`pgolf convert`: weights between PyTorch, safetensors, Orbax and run folders."""

from pathlib import Path
from typing import Literal

from pgolf_jax.settings.arguments import Positional


def convert(
  source: Positional[Path],
  target: Positional[Path],
  config: Path | None = None,
  weights: Literal["averaged", "raw"] = "averaged",
  key: str | None = None,
  form: Literal["pt", "safetensors", "orbax", "run"] | None = None,
  by_layer: bool = False,
) -> None:
  """Write weights in another form: PyTorch state dict, safetensors, Orbax checkpoint or run folder.

  Every bit is kept, and names are the recipe's, so that the PyTorch script's own model loads what is written. Shapes
  are checked against the config, or against each other where there is none. Nothing in a PyTorch file is executed. An
  artifact's weights come out dequantised.

  Example: pgolf convert final_model.pt runs/torch --config configs/record_8xh100.toml

  Args:
    source: .pt, .safetensors, artifact, Orbax checkpoint, run folder, or one of its checkpoints/STEP.
    target: file or folder to make: .pt, .safetensors or .orbax (a bare Orbax checkpoint) by its name, else a run
      folder, which `pgolf eval --weights averaged`, `pgolf quantize` and `pgolf run` go on from.
    config: settings of the model; needed for a run folder unless they lie beside the weights.
    weights: of a run: its moving average, or the weights of the last step.
    key: entry of a PyTorch file that is the state dict, where it holds several.
    form: of the target, where its name does not tell.
    by_layer: write matrices one by one (blocks.0.attn.c_q.weight), as scripts without banks have them.
  """
  from pgolf_jax.parity.convert import Choices
  from pgolf_jax.parity.convert import convert as convert_weights
  from pgolf_jax.runtime import distributed
  from pgolf_jax.settings.arguments import settings_of

  distributed.leave_devices()
  settings = None if config is None else settings_of(config)
  print("\n".join(convert_weights(source, target, Choices(settings, weights, key, form, by_layer))))


COMMANDS = {"convert": {"": convert}}

"""`pgolf bench`: every benchmark, by its module's name."""

from pgolf_jax.bench import compress, data, gpu_day, kernels, ngram, quantize, scoring, step, ttt
from pgolf_jax.cli.artifact import read_run
from pgolf_jax.settings.arguments import Defaults

COMMANDS = {
  "bench": {
    "kernels": kernels.COMMAND,
    "step": step.COMMAND,
    "start": step.START,
    "ttt": ttt.COMMAND,
    "gpu-day": gpu_day.COMMAND,
    "data": data.COMMAND,
    "ngram": ngram.COMMAND,
    "compress": compress.COMMAND,
    "scoring": scoring.COMMAND,
    "quantize": Defaults(quantize.COMMAND, read_run, example="runs/demo"),
  }
}

"""`pgolf bench`: every benchmark, by its module's name."""

from pgolf_jax.bench import compress, data, kernels, ngram, step, ttt

COMMANDS = {
  "bench": {
    "kernels": kernels.COMMAND,
    "step": step.COMMAND,
    "start": step.START,
    "ttt": ttt.COMMAND,
    "data": data.COMMAND,
    "ngram": ngram.COMMAND,
    "compress": compress.COMMAND,
  }
}

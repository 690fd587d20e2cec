"""Scores the artifact in this folder: python -I evaluate.py --data FOLDER [--ttt]. Needs what requirements.txt lists.

This file travels as `evaluate.py` beside the archive of the code. It unpacks the archive, builds the n-gram counter
where it is needed, and calls `submission.evaluate.main`.
"""

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path


def start(folder: Path, args: list[str]) -> int:
  """Runs the folder's own code."""
  with tempfile.TemporaryDirectory() as code:
    with tarfile.open(folder / "code.tar.xz") as archive:
      archive.extractall(code, filter="data")
    sys.path.insert(0, code)
    if "--ttt" in args:
      ngram = Path(code, "pgolf_jax/kernels/ngram")
      flags = ["-std=gnu11", "-O3", "-shared", "-fPIC", "-DPy_LIMITED_API=0x030B0000", "-pthread"]
      headers = f"-I{sysconfig.get_paths()['include']}"
      command = ["cc", *flags, headers, *map(str, ngram.glob("*.c")), "-o", str(ngram / "_ngram.abi3.so")]
      subprocess.run(command, check=True)
    import pgolf_jax  # out of the archive
    from pgolf_jax.submission.evaluate import main

    if not (pgolf_jax.__file__ or "").startswith(os.path.realpath(code)):
      sys.exit("Another pgolf_jax is imported in place of this folder's own code; run python with the option -I.")
    return main(folder, args)


if __name__ == "__main__":
  sys.exit(start(Path(__file__).resolve().parent, sys.argv[1:]))

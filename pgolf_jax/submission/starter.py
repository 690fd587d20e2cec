"""Scores the artifact in this folder: python evaluate.py --data FOLDER [--ttt]. Needs jax, flax, numpy, constriction.

It travels as `evaluate.py` beside the archive of the code: it unpacks that, builds the n-gram counter where it is
needed, and calls `rescore.main`.
"""

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path


def start(folder: Path, args: list[str]) -> int:
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
    import pgolf_jax
    from pgolf_jax.submission.rescore import main

    if not (pgolf_jax.__file__ or "").startswith(os.path.realpath(code)):
      sys.exit("Another pgolf_jax stands in the way of this folder's own code; run it with python -I.")
    return main(folder, args)


if __name__ == "__main__":
  sys.exit(start(Path(__file__).resolve().parent, sys.argv[1:]))

"""Writes the stored artifacts and the hashes of the weights in them. For a new format version only.

`zstd.pgolf` and `entropy.pgolf` are of version 1, which this program reads and no longer writes; those of version 2
hold other tensors than those of version 3.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from artifact_samples import CONFIG, ORIGIN, TOKENIZER, rate_tensors  # noqa: E402

from pgolf_jax.quantize.artifact import read, reader, writer  # noqa: E402
from pgolf_jax.quantize.artifact.codecs import NAMES  # noqa: E402

for name in NAMES:
  data = writer.write(CONFIG, rate_tensors(), name, ORIGIN, TOKENIZER)
  (HERE / f"{name}.{reader.VERSION}.pgolf").write_bytes(data)
params = read(data).params()
hashes = {key: hashlib.sha256(np.ascontiguousarray(v, "<f4").tobytes()).hexdigest() for key, v in params.items()}
(HERE / f"params.{reader.VERSION}.json").write_text(json.dumps(hashes, indent=1) + "\n")

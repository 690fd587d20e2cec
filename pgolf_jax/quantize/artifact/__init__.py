"""The artifact: one file with everything needed to rebuild the weights, and nothing that could run.

`load(path)` returns settings and parameters, `read_origin(path)` where it comes from and its tokenizer, `read(data)`
what a file holds, and `writer.write` makes a file's bytes. A submission ships this room without `writer` and
`codecs.search`.
"""

from pgolf_jax.quantize.artifact.header import Origin
from pgolf_jax.quantize.artifact.reader import Artifact, load, read, read_origin

__all__ = ["Artifact", "Origin", "load", "read", "read_origin"]

"""How the arrays of an artifact become bytes and bytes become arrays again, with the same bits on every machine.

A codec is chosen for a whole file. Encoding and decoding of one format stand side by side. Only `search`, which chooses
the model that an array is encoded under, is of no use to a reader and does not ship with a submission.
"""

from typing import Literal

Content = Literal["grid", "small", "half", "matrix", "integers"]
"""What a stream holds: int8 matrices of one kind from the quantiser, other int8 arrays, float16 arrays, int32 matrices
of one kind whose steps are known, or other int32 arrays."""

NAMES = ("zstd", "entropy")
"""The codecs; a file stores the index."""

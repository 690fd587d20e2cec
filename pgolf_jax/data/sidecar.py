"""The byte sidecar: how many bytes of the original text each validation token stands for."""

import numpy as np
from jaxtyping import Integer, UInt16

from pgolf_jax.data.caseops import original_bytes, utf8_bytes
from pgolf_jax.data.tokenizer import Tokenizer
from pgolf_jax.errors import UserError

MAX_BYTES = 2**16 - 1


def token_bytes(
  tokenizer: Tokenizer, coded: str, tokens_N: Integer[np.ndarray, "N"], *, is_caseops: bool = True
) -> UInt16[np.ndarray, "N"]:
  """UTF-8 bytes of original text under the surface of each piece (recipe section 1).

  Args:
    tokenizer: whose pieces `tokens_N` are.
    coded: the text that was tokenized.
    tokens_N: its pieces, without the leading bos.
    is_caseops: whether `coded` is CaseOps text, whose markers stand for no bytes, or the original itself.

  Raises:
    UserError: the tokens are not the pieces of `coded`, or one stands for more than 65,535 bytes.
  """
  bytes_C = original_bytes(coded) if is_caseops else utf8_bytes(coded)
  before_C = np.concatenate([[0], np.cumsum(bytes_C)])
  begin_N, end_N = tokenizer.surfaces(coded, tokens_N)
  bytes_N = before_C[end_N] - before_C[begin_N]
  if bytes_N.max(initial=0) > MAX_BYTES:
    raise UserError(
      f"one token stands for {bytes_N.max()} bytes, more than the sidecar's {MAX_BYTES}; shorten the text"
    )
  return bytes_N.astype(np.uint16)

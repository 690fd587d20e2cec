"""Counts of what followed each context of a token stream, in C.

  state = NgramState(order=16, threshold=0.8)
  hint, gate = state.update(tokens)  # from left to right; each hint from what came before its token

`api.py` is the Python side, `reference.py` the same thing in a page of plain Python, slow and plainly right.

How the C works. The stream itself is kept, 4 bytes a token. Two open-addressing tables with entries of 8 bytes, one of
contexts and one of pairs (a context and its next token), hold 32 bits of hash and a position in the stream; only
what occurs twice gets a record with counts. An entry's tokens are read back from the stream, so contexts are compared
in full (mode "exact") or by keys computed again (mode "reference") without being stored. As contexts consist of
known tokens, the keys of a block of targets are computed ahead and their cache lines asked for ahead; counts are
only read and written in the order of the stream. Threads split contexts, never positions, and in such a way that two
contexts whose pairs could share a key lie with the same thread; so no count depends on how many there are.

Files: `table.[ch]` tables that grow, `keys.h` the published keys, `shard.[ch]` counts and hints, `state.[ch]` the
stream and the threads, `_ngram.c` the Python type (stable ABI of 3.11). `sanitize.sh` runs the tests under
AddressSanitizer, LeakSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.
"""

from pgolf_jax.kernels.ngram.api import MAX_ORDER, Mode, NgramState

__all__ = ["MAX_ORDER", "Mode", "NgramState"]

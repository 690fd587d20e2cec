"""Counts of what followed each context of a token stream, in C.

  state = NgramState(order=16, threshold=0.8)
  hint, gate = state.update(tokens)  # from left to right; each hint from what came before its token

`api.py` is the Python side. `reference.py` is the same computation in a page of plain Python, for comparison.

How the C works. The stream itself is stored, 4 bytes a token. Two open-addressing tables with entries of 8 bytes, one
of contexts and one of pairs (a context and its next token), hold 32 bits of hash and a position in the stream. Only
what occurs twice gets a record with counts. Tokens of an entry are read from the stream: contexts are compared in full
(mode "exact") or by keys that are computed again (mode "reference"), and neither is stored. Contexts consist of known
tokens, so the keys of a block of targets are computed ahead, and their cache lines are requested ahead; counts are
read and written only in the order of the stream. Threads divide contexts among them, never positions. Two contexts
whose pairs could share a key belong to one thread, so counts do not depend on the number of threads.

Files: `table.[ch]` tables that grow, `keys.h` the published keys, `shard.[ch]` counts and hints, `state.[ch]` the
stream and the threads, `_ngram.c` the Python type (stable ABI of 3.11). `sanitize.sh` runs the tests under
AddressSanitizer, LeakSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.
"""

from pgolf_jax.kernels.ngram.api import MAX_ORDER, Mode, NgramState

__all__ = ["MAX_ORDER", "Mode", "NgramState"]

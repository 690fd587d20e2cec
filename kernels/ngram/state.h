/* Counts of what followed each context of a token stream, and the hints that follow from them. No Python here. */

#ifndef PGOLF_NGRAM_STATE_H
#define PGOLF_NGRAM_STATE_H

#include "table.h"

enum {
  NGRAM_MAX_CONTEXT = 31, /* tokens; the published list has 32 coefficients and pairs need one more than contexts */
  NGRAM_MAX_SHARDS = 64,
};

/* Positions and record numbers are kept in 31 bits. */
#define NGRAM_MAX_TOKENS ((size_t)0x7ffffffe)

/* Shards split contexts so that no count is shared between two of them, and each has a thread of its own. */
typedef struct {
  table contexts;
  table pairs;
  vector context_records;
  vector pair_records;
} ngram_shard;

typedef struct {
  int context;         /* tokens in a context: order - 1 */
  bool exact;          /* compare contexts in full; otherwise by the published 64-bit keys */
  float threshold;     /* lowest confidence that opens the gate */
  uint64_t vocab_size; /* tokens are below it */
  size_t expected;     /* targets in all, as far as is known; sizes tables and is never a limit */
  int shards;
  int group_shift;     /* by which contexts are shared out, see keys.h */
  vector history;      /* uint32: every token so far, seeds included */
  ngram_shard *shard;
} ngram;

/* Results of one update, n each; confidence may be NULL. */
typedef struct {
  uint32_t *hint;
  uint8_t *gate;
  float *confidence;
} ngram_out;

/* An empty state. False where memory is short; nothing is then left to free. */
bool ngram_init(ngram *state, int context, bool exact, float threshold, uint64_t vocab_size, size_t expected,
                int shards);
void ngram_free(ngram *state);

/* Room for n more tokens at the end of the history, as uninitialised memory at `*tokens`; the caller fills it and adds
   n to history.count. False where memory is short; the state is then as it was. */
bool ngram_extend(ngram *state, size_t n, uint32_t **tokens);

/* For each of the last n tokens of the history, from left to right: the hint from what came before, then the token
   is counted. All n results are written; zero where there is no hint. False where memory is short: the counts are
   then incomplete, and the state is good for ngram_free alone. */
bool ngram_count(ngram *state, size_t n, ngram_out out);

/* Bytes of the history, tables and records, as allocated. */
size_t ngram_bytes(const ngram *state);

#endif

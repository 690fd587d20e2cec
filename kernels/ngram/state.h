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

/* The counts of some of the contexts. No two shards share a count, so each can have its own thread. */
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
  size_t expected;     /* targets in the whole stream, if known; it sizes tables and is no limit */
  int shards;
  int group_shift;     /* divides contexts among shards, see keys.h */
  vector history;      /* uint32: every token so far, seeds included */
  ngram_shard *shard;
} ngram;

/* Results of one update, n each; confidence and total may be NULL. */
typedef struct {
  uint32_t *hint;
  uint8_t *gate;
  float *confidence;
  uint32_t *total;
} ngram_out;

/* Makes an empty state. Returns false if memory is short; nothing then needs to be freed. */
bool ngram_init(ngram *state, int context, bool exact, float threshold, uint64_t vocab_size, size_t expected,
                int shards);
void ngram_free(ngram *state);

/* Makes room for n more tokens at the end of the history, as uninitialised memory at `*tokens`; the caller fills it and
   adds n to history.count. Returns false if memory is short; the state has then not changed. */
bool ngram_extend(ngram *state, size_t n, uint32_t **tokens);

/* For each of the last n tokens of the history, from left to right, writes the hint from what came before and then
   counts the token. All n results are written, as zero where there is no hint. Returns false if memory is short; the
   counts are then incomplete, and the state can only be passed to ngram_free. */
bool ngram_count(ngram *state, size_t n, ngram_out out);

/* Returns the allocated bytes of the history, tables and records. */
size_t ngram_bytes(const ngram *state);

#endif

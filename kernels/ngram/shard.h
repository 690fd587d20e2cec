/* One shard's part of an update. */

#ifndef PGOLF_NGRAM_SHARD_H
#define PGOLF_NGRAM_SHARD_H

#include "state.h"

/* Does what ngram_count does for the contexts of one shard; the results of others are not touched. */
bool shard_count(const ngram *state, int number, size_t n, ngram_out out);

void shard_free(ngram_shard *shard);

/* Returns the allocated bytes of the tables and records. */
size_t shard_bytes(const ngram_shard *shard);

#endif

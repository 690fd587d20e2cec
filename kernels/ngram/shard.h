/* One shard's part of an update. */

#ifndef PGOLF_NGRAM_SHARD_H
#define PGOLF_NGRAM_SHARD_H

#include "state.h"

/* ngram_count for the contexts of one shard; results elsewhere are left as they are. */
bool shard_count(const ngram *state, int number, size_t n, ngram_out out);

void shard_free(ngram_shard *shard);

/* Bytes of the tables and records, as allocated. */
size_t shard_bytes(const ngram_shard *shard);

#endif

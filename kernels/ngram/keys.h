/* The published keys of contexts and pairs, and the hashes made of them. */

#ifndef PGOLF_NGRAM_KEYS_H
#define PGOLF_NGRAM_KEYS_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "state.h"

/* The published multipliers of a context's tokens, oldest first. The token after a context has the next one. */
static const uint32_t COEFFICIENT[NGRAM_MAX_CONTEXT + 1] = {
    36313,   27191,   51647,   81929,   131071,  196613,  262147,  393241,  524309,  655373,  786433,
    917521,  1048583, 1179653, 1310729, 1441801, 1572869, 1703941, 1835017, 1966087, 2097169, 2228243,
    2359319, 2490389, 2621471, 2752549, 2883617, 3014687, 3145757, 3276833, 3407903, 3538973,
};
static const uint64_t PAIR = 1000003;

static inline uint64_t mixed(uint64_t x) {
  x ^= x >> 32;
  x *= 0xd6e8feb86659fd93u;
  x ^= x >> 32;
  return x * 0xd6e8feb86659fd93u;
}

/* Returns a hash that is never 0, which marks an empty entry. */
static inline uint32_t hash_of(uint64_t key) { return (uint32_t)(mixed(key) >> 32) | 1; }

static inline uint64_t pair_key(uint64_t key, uint32_t token, int context) {
  return key * PAIR ^ (uint64_t)token * COEFFICIENT[context];
}

/* Writes the keys of the contexts of `count` neighbouring targets; `first` is the oldest token of the first context.
   It takes one coefficient at a time, so that the compiler can work on several targets at once. */
static inline void context_keys(const uint32_t *first, int context, int count, uint64_t *key) {
  memset(key, 0, (size_t)count * sizeof *key);
  for (int j = 0; j < context; ++j) {
    const uint32_t c = COEFFICIENT[j];
    for (int i = 0; i < count; ++i) key[i] ^= (uint64_t)first[i + j] * c;
  }
}

/* Returns a shift for `shard_of`. A pair key is key·PAIR xored with a number below 2^shift. Two contexts whose pairs can
   share a key therefore agree in key·PAIR from bit `shift` on: they belong to one group. */
static inline int group_shift_of(uint64_t vocab_size, int context) {
  int shift = 0;
  for (uint64_t most = (vocab_size - 1) * COEFFICIENT[context]; most; most >>= 1) shift += 1;
  return shift;
}

/* Returns the shard of a context. Contexts compared in full share no counts; otherwise a group stays together. */
static inline int shard_of(uint64_t key, bool exact, int group_shift, int shards) {
  const uint64_t group = exact ? key : (key * PAIR) >> group_shift;
  const uint64_t spread = mixed(group ^ 0x9e3779b97f4a7c15u) >> 32; /* independent of hash_of, which places entries in tables */
  return (int)((spread * (uint64_t)shards) >> 32);
}

#endif

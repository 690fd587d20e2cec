/* An open-addressing table that only grows, and the vectors that stand beside it.

   An entry is a 32-bit hash and a 32-bit reference. A bucket is one cache line of eight entries, filled from its front.
   An entry that does not fit into its bucket goes to the next one. The hash alone gives the bucket: hash·buckets / 2^32
   rises with the hash for any number of buckets. The number of buckets need therefore be no power of two, and growth
   reads the old buckets in order, writes the new ones nearly in order, and needs no keys. The caller decides whether
   two keys are the same; the table only brings together entries with the same 32 bits. */

#ifndef PGOLF_NGRAM_TABLE_H
#define PGOLF_NGRAM_TABLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

enum { BUCKET = 8 };

typedef struct {
  uint32_t hash[BUCKET]; /* 0: empty */
  uint32_t ref[BUCKET];
} bucket;

typedef struct {
  void *memory;    /* the allocation that holds `buckets`, which are aligned to cache lines */
  bucket *buckets; /* `size` of them */
  uint64_t size;   /* below 2^32 */
  uint64_t count;  /* entries */
} table;

/* Records of one fixed width in one block of memory. */
typedef struct {
  void *items;
  size_t count;
  size_t capacity;
} vector;

/* Makes room for `extra` more entries. A table that must grow also makes room for `expected` entries in all.
   Returns false if memory is short; the table has then not changed. */
bool table_reserve(table *t, uint64_t extra, uint64_t expected);
void table_free(table *t);

/* Makes room for `extra` more items of `width` bytes. A vector that must grow also makes room for `expected` in all.
   Returns false if memory is short; the vector has then not changed. */
bool vector_reserve(vector *v, size_t extra, size_t width, size_t expected);
void vector_free(vector *v);

static inline uint64_t table_home(const table *t, uint32_t hash) { return (hash * t->size) >> 32; }

static inline uint64_t table_next(const table *t, uint64_t index) { return index + 1 == t->size ? 0 : index + 1; }

/* Returns a mask whose bit i is set if entry i has this hash, or, for hash 0, if it is empty. */
static inline uint32_t bucket_matches(const bucket *b, uint32_t hash) {
#if defined(__SSE2__)
  const __m128i wanted = _mm_set1_epi32((int)hash);
  const __m128i *four = (const __m128i *)b->hash;
  const __m128i low = _mm_cmpeq_epi32(_mm_load_si128(four), wanted);
  const __m128i high = _mm_cmpeq_epi32(_mm_load_si128(four + 1), wanted);
  const __m128i both = _mm_packs_epi32(low, high);
  return (uint32_t)_mm_movemask_epi8(_mm_packs_epi16(both, _mm_setzero_si128()));
#else
  uint32_t matches = 0;
  for (int i = 0; i < BUCKET; ++i) matches |= (uint32_t)(b->hash[i] == hash) << i;
  return matches;
#endif
}

static inline bool bucket_full(const bucket *b) { return b->hash[BUCKET - 1] != 0; }

/* Puts an entry into a bucket that is not full. */
static inline void bucket_insert(bucket *b, uint32_t hash, uint32_t ref) {
  const int first_empty = __builtin_ctz(bucket_matches(b, 0));
  b->hash[first_empty] = hash;
  b->ref[first_empty] = ref;
}

/* Inserts without looking for the hash; there must be room. */
static inline void table_insert(table *t, uint32_t hash, uint32_t ref) {
  uint64_t i = table_home(t, hash);
  while (bucket_full(&t->buckets[i])) i = table_next(t, i);
  bucket_insert(&t->buckets[i], hash, ref);
  t->count += 1;
}

#endif

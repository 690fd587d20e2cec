#include "table.h"

#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

enum { FEWEST_BUCKETS = 64 };
static const double EXPECTED_LOAD = 0.75; /* when all expected entries are in */
static const double HIGHEST_LOAD = 0.85;  /* past it too many buckets overflow, and the table grows */

/* Allocates zeroed buckets, in large pages if possible: lookups are random, and small pages cost a TLB miss each. */
static bool allocate(table *t, uint64_t size) {
  const uintptr_t line = sizeof(bucket);
  void *memory = calloc(size + 1, sizeof(bucket));
  if (!memory) return false;
  const uintptr_t start = ((uintptr_t)memory + line - 1) & ~(line - 1);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = (uintptr_t)1 << 21;
  const uintptr_t first = (start + page - 1) & ~(page - 1);
  const uintptr_t last = (start + size * sizeof(bucket)) & ~(page - 1);
  if (first < last) (void)madvise((void *)first, last - first, MADV_HUGEPAGE); /* a hint: refusal does no harm */
#endif
  *t = (table){memory, (bucket *)start, size, 0};
  return true;
}

static bool resize(table *t, uint64_t size) {
  table grown;
  if (!allocate(&grown, size)) return false;
  for (uint64_t i = 0; i < t->size; ++i) {
    const bucket *from = &t->buckets[i];
    for (int k = 0; k < BUCKET && from->hash[k]; ++k) table_insert(&grown, from->hash[k], from->ref[k]);
  }
  free(t->memory);
  *t = grown;
  return true;
}

bool table_reserve(table *t, uint64_t extra, uint64_t expected) {
  const double need = (double)(t->count + extra) / (HIGHEST_LOAD * BUCKET);
  if (need < (double)t->size) return true;
  double size = (double)expected / (EXPECTED_LOAD * BUCKET);
  if (size <= need) size = need * 1.5; /* more entries than expected */
  size += FEWEST_BUCKETS;
  return size < 4294967295.0 && resize(t, (uint64_t)size);
}

void table_free(table *t) {
  free(t->memory);
  *t = (table){0};
}

bool vector_reserve(vector *v, size_t extra, size_t width, size_t expected) {
  if (v->capacity - v->count >= extra) return true;
  size_t capacity = v->count + v->count / 4 + extra;
  if (capacity < expected) capacity = expected;
  if (capacity > SIZE_MAX / width) return false;
  void *items = realloc(v->items, capacity * width);
  if (!items) return false;
  v->items = items;
  v->capacity = capacity;
  return true;
}

void vector_free(vector *v) {
  free(v->items);
  *v = (vector){0};
}

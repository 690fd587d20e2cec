#include "table.h"

#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

enum { SMALLEST = 1024 };
static const double EXPECTED_LOAD = 0.75; /* once everything that was expected is in */
static const double HIGHEST_LOAD = 0.85;  /* past it, probes grow long and the table grows */

/* Zeroed slots. Lookups are random, so pages of 4 KB would cost a TLB miss each: ask for large ones. */
static slot *new_slots(uint64_t size) {
  slot *slots = calloc(size, sizeof(slot));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = (uintptr_t)1 << 21;
  uintptr_t first = ((uintptr_t)slots + page - 1) & ~(page - 1);
  uintptr_t last = ((uintptr_t)slots + size * sizeof(slot)) & ~(page - 1);
  if (slots && first < last) (void)madvise((void *)first, last - first, MADV_HUGEPAGE);
#endif
  return slots;
}

static bool resize(table *t, uint64_t size) {
  table grown = {new_slots(size), size, t->count};
  if (!grown.slots) return false;
  for (uint64_t i = 0; i < t->size; ++i) {
    if (!t->slots[i].ref) continue;
    uint64_t j = table_home(&grown, t->slots[i].hash);
    while (grown.slots[j].ref) j = table_next(&grown, j);
    grown.slots[j] = t->slots[i];
  }
  free(t->slots);
  *t = grown;
  return true;
}

bool table_reserve(table *t, uint64_t extra, uint64_t expected) {
  const double need = (double)(t->count + extra) / HIGHEST_LOAD;
  if (need < (double)t->size) return true;
  double size = (double)expected / EXPECTED_LOAD;
  if (size <= need) { /* more came than was expected */
    size = need * 1.25;
  } else {
    while (size / 2 > need && size / 2 > SMALLEST) size /= 2;
  }
  size += SMALLEST;
  return size < 4294967295.0 && resize(t, (uint64_t)size);
}

void table_free(table *t) {
  free(t->slots);
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

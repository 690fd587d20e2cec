/* An open-addressing table of 8-byte slots that only grows, and the vectors that stand beside it.

   A slot is a 32-bit hash and a 32-bit reference. The hash alone gives the slot's home: home = hash·size / 2^32, a
   monotone map for any size. So the table needs no power of two, and growing it reads the old slots in order, writes
   the new ones nearly in order, and never asks for the keys. Whether two keys are the same is for the caller to
   settle; the table only brings together what has the same 32 bits. */

#ifndef PGOLF_NGRAM_TABLE_H
#define PGOLF_NGRAM_TABLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct {
  uint32_t hash;
  uint32_t ref; /* 0: empty */
} slot;

typedef struct {
  slot *slots;
  uint64_t size;  /* slots; below 2^32 */
  uint64_t count; /* slots in use */
} table;

/* Records of one fixed width in one block of memory. */
typedef struct {
  void *items;
  size_t count;
  size_t capacity;
} vector;

/* Room for `extra` more entries, without passing the highest load. `expected` is how many the caller expects in all:
   sizes double on the way there and land on it, so that the last one is no larger than it must be.
   False where memory is short; the table is then as it was. */
bool table_reserve(table *t, uint64_t extra, uint64_t expected);
void table_free(table *t);

/* Room for `extra` more items of `width` bytes. False where memory is short; the vector is then as it was. */
bool vector_reserve(vector *v, size_t extra, size_t width, size_t expected);
void vector_free(vector *v);

static inline uint64_t table_home(const table *t, uint32_t hash) { return (hash * t->size) >> 32; }

static inline uint64_t table_next(const table *t, uint64_t index) { return index + 1 == t->size ? 0 : index + 1; }

#endif

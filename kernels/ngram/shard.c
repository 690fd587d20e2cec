#include "shard.h"

#include "keys.h"

enum {
  BLOCK = 512,      /* targets whose keys are computed ahead */
  BUCKET_AHEAD = 32 /* targets between asking for the cache lines of buckets and using them */
};

/* References in a table: the position of a context or pair that was seen once, or RECORD plus the number of the record
   of one that was seen again. */
static const uint32_t RECORD = 0x80000000u;

typedef struct {
  uint32_t position; /* where the context stood when `best` last grew: the best token is the one there */
  uint32_t total;
  uint32_t best;
} context_record;

typedef struct {
  uint32_t position; /* any occurrence of the pair */
  uint32_t count;
} pair_record;

/* What is computed for one target before its turn. */
typedef struct {
  uint64_t key;
  uint64_t pair_key;
  uint32_t position;
  uint32_t hash;
  uint32_t pair_hash;
} event;

/* What does not change during an update. */
typedef struct {
  ngram_shard *shard;
  const uint32_t *history;
  int context;
  float threshold;
  bool exact;
} pass;

/* Everything that `count_as` calls is inlined into it, so that each of the two modes has its own loop, in which `exact`
   is a constant. This saves a fifth of the time. */
#define INLINED static inline __attribute__((always_inline))

static uint64_t key_at(const pass *p, uint32_t position) {
  uint64_t key;
  context_keys(p->history + position - p->context, p->context, 1, &key);
  return key;
}

INLINED bool same_tokens(const uint32_t *a, const uint32_t *b, int n) {
  for (int i = n - 1; i >= 0; --i) {
    if (a[i] != b[i]) return false;
  }
  return true;
}

INLINED bool same_context(const pass *p, uint32_t old, const event *e) {
  const int n = p->context;
  if (same_tokens(p->history + old - n, p->history + e->position - n, n)) return true;
  return !p->exact && key_at(p, old) == e->key;
}

INLINED bool same_pair(const pass *p, uint32_t old, const event *e) {
  const int n = p->context;
  if (same_tokens(p->history + old - n, p->history + e->position - n, n + 1)) return true;
  return !p->exact && pair_key(key_at(p, old), p->history[old], n) == e->pair_key;
}

INLINED uint32_t add_pair_record(const pass *p, uint32_t position, uint32_t count) {
  const size_t number = p->shard->pair_records.count++;
  ((pair_record *)p->shard->pair_records.items)[number] = (pair_record){position, count};
  return RECORD | (uint32_t)number;
}

INLINED uint32_t add_context_record(const pass *p, uint32_t position, uint32_t total, uint32_t best) {
  const size_t number = p->shard->context_records.count++;
  ((context_record *)p->shard->context_records.items)[number] = (context_record){position, total, best};
  return RECORD | (uint32_t)number;
}

INLINED context_record *context_record_of(const pass *p, uint32_t ref) {
  return (context_record *)p->shard->context_records.items + (ref & ~RECORD);
}

/* Counts the pair once more and returns its count, this time included. */
INLINED uint32_t count_pair(const pass *p, const event *e) {
  table *t = &p->shard->pairs;
  for (uint64_t i = table_home(t, e->pair_hash);; i = table_next(t, i)) {
    bucket *b = &t->buckets[i];
    for (uint32_t matches = bucket_matches(b, e->pair_hash); matches; matches &= matches - 1) {
      uint32_t *ref = &b->ref[__builtin_ctz(matches)];
      if (*ref & RECORD) {
        pair_record *record = (pair_record *)p->shard->pair_records.items + (*ref & ~RECORD);
        if (same_pair(p, record->position, e)) return record->count += 1;
      } else if (same_pair(p, *ref, e)) {
        *ref = add_pair_record(p, *ref, 2);
        return 2;
      }
    }
    if (bucket_full(b)) continue;
    bucket_insert(b, e->pair_hash, e->position);
    t->count += 1;
    return 1;
  }
}

/* Returns the record of a target's context, which is made if the context was seen once before. For a new context it
   returns NULL and sets `*end` to the bucket where the context belongs. */
INLINED context_record *find_context(const pass *p, const event *e, bucket **end) {
  table *t = &p->shard->contexts;
  for (uint64_t i = table_home(t, e->hash);; i = table_next(t, i)) {
    bucket *b = &t->buckets[i];
    for (uint32_t matches = bucket_matches(b, e->hash); matches; matches &= matches - 1) {
      uint32_t *ref = &b->ref[__builtin_ctz(matches)];
      if (*ref & RECORD) {
        context_record *record = context_record_of(p, *ref);
        if (same_context(p, record->position, e)) return record;
      } else if (same_context(p, *ref, e)) {
        *ref = add_context_record(p, *ref, 1, 1);
        return context_record_of(p, *ref);
      }
    }
    *end = b;
    if (!bucket_full(b)) return NULL;
  }
}

/* Counts the pair once more, in a context compared in full, and returns its count, this time included. As long as only
   one token has followed a context, its count is the context's total and the table of pairs has no entry for it, which
   keeps that table small. */
INLINED uint32_t count_pair_lazily(const pass *p, const event *e, const context_record *record) {
  if (record->best == record->total) {
    const uint32_t token = p->history[record->position];
    if (token == p->history[e->position]) return record->best + 1;
    const uint32_t ref = add_pair_record(p, record->position, record->best);
    table_insert(&p->shard->pairs, hash_of(pair_key(e->key, token, p->context)), ref);
  }
  return count_pair(p, e);
}

/* Gives the hint for one target and counts the target. */
INLINED void take(const pass *p, const event *e, size_t out_at, ngram_out out) {
  uint32_t pair = p->exact ? 1 : count_pair(p, e);
  bucket *end = NULL;
  context_record *record = find_context(p, e, &end);
  if (!record) {
    /* A pair that was counted before, in a new context, shares the published key of another context's pair: it takes
       over that pair's count. */
    bucket_insert(end, e->hash, pair > 1 ? add_context_record(p, e->position, 1, pair) : e->position);
    p->shard->contexts.count += 1;
    return;
  }
  const float confidence = (float)record->best / (float)record->total;
  if (out.confidence) out.confidence[out_at] = confidence;
  if (out.total) out.total[out_at] = record->total;
  out.hint[out_at] = p->history[record->position];
  out.gate[out_at] = confidence >= p->threshold;
  if (p->exact) pair = count_pair_lazily(p, e, record);
  record->total += 1;
  if (pair > record->best) {
    record->best = pair;
    record->position = e->position;
  }
}

/* Writes this shard's events among the targets at [begin, end) of the history, and returns their number. */
static int events_of(const ngram *s, int number, const uint32_t *history, size_t begin, size_t end, event *events) {
  uint64_t keys[BLOCK];
  const int count = (int)(end - begin);
  context_keys(history + begin - s->context, s->context, count, keys);
  int mine = 0;
  for (int i = 0; i < count; ++i) {
    event *e = &events[mine];
    e->key = keys[i];
    e->pair_key = pair_key(keys[i], history[begin + i], s->context);
    e->position = (uint32_t)(begin + i);
    e->hash = hash_of(keys[i]);
    e->pair_hash = hash_of(e->pair_key);
    mine += s->shards == 1 || shard_of(keys[i], s->exact, s->group_shift, s->shards) == number;
  }
  return mine;
}

/* Makes room for everything that `count` targets can add. */
static bool reserve(const pass *p, size_t count, size_t expected) {
  const size_t pairs = p->exact ? 2 * count : count; /* a second token adds its pair and the first token's */
  return table_reserve(&p->shard->contexts, count, expected) &&
         table_reserve(&p->shard->pairs, pairs, p->exact ? 0 : expected) &&
         vector_reserve(&p->shard->context_records, count, sizeof(context_record), 0) &&
         vector_reserve(&p->shard->pair_records, pairs, sizeof(pair_record), 0);
}

INLINED bool count_as(const ngram *s, bool exact, int number, size_t n, ngram_out out) {
  const pass p = {&s->shard[number], s->history.items, s->context, s->threshold, exact};
  const table *contexts = &p.shard->contexts, *pairs = &p.shard->pairs;
  const size_t end = s->history.count;
  const size_t start = end - n;
  event events[BLOCK];
  size_t begin = start < (size_t)s->context ? (size_t)s->context : start; /* no hint before a full context */
  for (; begin < end; begin += BLOCK) {
    const size_t stop = end - begin < BLOCK ? end : begin + BLOCK;
    const int count = events_of(s, number, p.history, begin, stop, events);
    if (!reserve(&p, (size_t)count, s->expected / (size_t)s->shards)) return false;
    /* Exact counting puts few contexts' pairs into the table if contexts are long: few of its lines are then needed. */
    const bool pairs_matter = !exact || pairs->count > contexts->count / 4;
    for (int i = -BUCKET_AHEAD; i < count; ++i) {
      if (i + BUCKET_AHEAD < count) {
        const event *e = &events[i + BUCKET_AHEAD];
        __builtin_prefetch(&contexts->buckets[table_home(contexts, e->hash)], 1);
        if (pairs_matter) __builtin_prefetch(&pairs->buckets[table_home(pairs, e->pair_hash)], 1);
      }
      if (i >= 0) take(&p, &events[i], events[i].position - start, out);
    }
  }
  return true;
}

bool shard_count(const ngram *s, int number, size_t n, ngram_out out) {
  return s->exact ? count_as(s, true, number, n, out) : count_as(s, false, number, n, out);
}

void shard_free(ngram_shard *shard) {
  table_free(&shard->contexts);
  table_free(&shard->pairs);
  vector_free(&shard->context_records);
  vector_free(&shard->pair_records);
}

size_t shard_bytes(const ngram_shard *shard) {
  return (shard->contexts.size + shard->pairs.size) * sizeof(bucket) +
         shard->context_records.capacity * sizeof(context_record) +
         shard->pair_records.capacity * sizeof(pair_record);
}

#include "state.h"

#include "keys.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum {
  BLOCK = 512,              /* targets whose keys are computed ahead */
  BUCKET_AHEAD = 12,        /* targets between asking for a bucket and using it */
  RECORD_AHEAD = 4,         /* the same for what its entry refers to */
  SMALLEST_THREADED = 8192, /* targets for which starting a thread pays */
  SPARE_SEEDS = 64          /* seeds that the history has room for besides the expected targets */
};

/* What a table refers to: a context or pair seen once, by its position; seen again, by RECORD plus the number of its
   record. */
static const uint32_t RECORD = 0x80000000u;

typedef struct {
  uint32_t position; /* where the context was last seen when `best` grew, so the best token stands there */
  uint32_t total;
  uint32_t best;
} context_record;

typedef struct {
  uint32_t position; /* any occurrence of the pair */
  uint32_t count;
} pair_record;

/* What is known of one target before its turn. */
typedef struct {
  uint64_t key;
  uint64_t pair_key;
  uint32_t position;
  uint32_t hash;
  uint32_t pair_hash;
} event;

static uint64_t key_at(const ngram *s, const uint32_t *history, uint32_t position) {
  uint64_t key;
  context_keys(history + position - s->context, s->context, 1, &key);
  return key;
}

static inline bool same_tokens(const uint32_t *a, const uint32_t *b, int n) {
  for (int i = n - 1; i >= 0; --i) {
    if (a[i] != b[i]) return false;
  }
  return true;
}

static inline bool same_context(const ngram *s, const uint32_t *history, uint32_t old, const event *e) {
  if (same_tokens(history + old - s->context, history + e->position - s->context, s->context)) return true;
  return !s->exact && key_at(s, history, old) == e->key;
}

static inline bool same_pair(const ngram *s, const uint32_t *history, uint32_t old, const event *e) {
  const int n = s->context;
  if (same_tokens(history + old - n, history + e->position - n, n + 1)) return true;
  return !s->exact && pair_key(key_at(s, history, old), history[old], s->context) == e->pair_key;
}

/* Counts the pair once more; its count, this time included. */
static uint32_t count_pair(const ngram *s, ngram_shard *shard, const uint32_t *history, const event *e) {
  table *t = &shard->pairs;
  pair_record *records = shard->pair_records.items;
  for (uint64_t i = table_home(t, e->pair_hash);; i = table_next(t, i)) {
    bucket *b = &t->buckets[i];
    for (uint32_t matches = bucket_matches(b, e->pair_hash); matches; matches &= matches - 1) {
      uint32_t *ref = &b->ref[__builtin_ctz(matches)];
      if (*ref & RECORD) {
        pair_record *record = &records[*ref & ~RECORD];
        if (same_pair(s, history, record->position, e)) return record->count += 1;
      } else if (same_pair(s, history, *ref, e)) {
        const size_t number = shard->pair_records.count++;
        records[number] = (pair_record){e->position, 2};
        *ref = RECORD | (uint32_t)number;
        return 2;
      }
    }
    if (bucket_full(b)) continue;
    bucket_insert(b, e->pair_hash, e->position);
    t->count += 1;
    return 1;
  }
}

/* The record of a target's context, made if it was seen once before. If it is new, NULL, and `*end` is the bucket
   where it belongs. */
static context_record *find_context(const ngram *s, ngram_shard *shard, const uint32_t *history, const event *e,
                                    bucket **end) {
  table *t = &shard->contexts;
  context_record *records = shard->context_records.items;
  for (uint64_t i = table_home(t, e->hash);; i = table_next(t, i)) {
    bucket *b = &t->buckets[i];
    for (uint32_t matches = bucket_matches(b, e->hash); matches; matches &= matches - 1) {
      uint32_t *ref = &b->ref[__builtin_ctz(matches)];
      if (*ref & RECORD) {
        context_record *record = &records[*ref & ~RECORD];
        if (same_context(s, history, record->position, e)) return record;
      } else if (same_context(s, history, *ref, e)) {
        const size_t number = shard->context_records.count++;
        records[number] = (context_record){*ref, 1, 1};
        *ref = RECORD | (uint32_t)number;
        return &records[number];
      }
    }
    *end = b;
    if (!bucket_full(b)) return NULL;
  }
}

/* The count of the pair in a context compared in full, this time included. As long as one token alone has followed a
   context, its count is the context's, and the table of pairs holds nothing; so it stays small. */
static uint32_t count_pair_lazily(const ngram *s, ngram_shard *shard, const uint32_t *history, const event *e,
                                  const context_record *record) {
  if (record->best == record->total) {
    const uint32_t token = history[record->position];
    if (token == history[e->position]) return record->best + 1;
    const uint32_t number = (uint32_t)shard->pair_records.count++;
    ((pair_record *)shard->pair_records.items)[number] = (pair_record){record->position, record->best};
    table_insert(&shard->pairs, hash_of(pair_key(e->key, token, s->context)), RECORD | number);
  }
  return count_pair(s, shard, history, e);
}

/* Gives the hint for one target and counts the target. */
static void take(const ngram *s, ngram_shard *shard, const uint32_t *history, const event *e, size_t out_at,
                 ngram_out out) {
  uint32_t pair = s->exact ? 1 : count_pair(s, shard, history, e);
  bucket *end;
  context_record *record = find_context(s, shard, history, e, &end);
  if (!record) {
    uint32_t ref = e->position;
    if (pair > 1) { /* another context had this pair key: the published scheme takes its count over */
      const uint32_t number = (uint32_t)shard->context_records.count++;
      ((context_record *)shard->context_records.items)[number] = (context_record){e->position, 1, pair};
      ref = RECORD | number;
    }
    bucket_insert(end, e->hash, ref);
    shard->contexts.count += 1;
    return;
  }
  const float confidence = (float)record->best / (float)record->total;
  if (out.confidence) out.confidence[out_at] = confidence;
  out.hint[out_at] = history[record->position];
  out.gate[out_at] = confidence >= s->threshold;
  if (s->exact) pair = count_pair_lazily(s, shard, history, e, record);
  record->total += 1;
  if (pair > record->best) {
    record->best = pair;
    record->position = e->position;
  }
}

/* Asks for the cache lines behind an entry: its record, or the tokens that it will be compared with. True where there
   is a record. */
static inline bool prefetch_referred(const table *t, uint32_t hash, const vector *records, size_t width,
                                     const ngram *s) {
  const bucket *b = &t->buckets[table_home(t, hash)];
  const uint32_t matches = bucket_matches(b, hash);
  if (!matches) return false;
  const uint32_t ref = b->ref[__builtin_ctz(matches)];
  if (ref & RECORD) {
    __builtin_prefetch((const char *)records->items + (ref & ~RECORD) * width);
    return true;
  }
  const uint32_t *token = (const uint32_t *)s->history.items + ref;
  __builtin_prefetch(token);
  __builtin_prefetch(token - s->context);
  return false;
}

/* Events of this shard among the targets at [begin, end) of the history. */
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
    if (s->shards > 1) {
      const uint64_t group = s->exact ? keys[i] : (keys[i] * PAIR) >> s->group_shift;
      const uint64_t spread = mixed(group ^ 0x9e3779b97f4a7c15u) >> 32;
      mine += ((spread * (uint64_t)s->shards) >> 32) == (uint64_t)number;
    } else {
      ++mine;
    }
  }
  return mine;
}

/* Room for all that `count` targets can add. */
static bool reserve(const ngram *s, ngram_shard *shard, size_t count) {
  const size_t expected = s->expected / (size_t)s->shards;
  const size_t pairs = s->exact ? 2 * count : count; /* lazily, the pairs before and of a context's second token */
  return table_reserve(&shard->contexts, count, expected) &&
         table_reserve(&shard->pairs, pairs, s->exact ? 0 : expected) &&
         vector_reserve(&shard->context_records, count, sizeof(context_record), 0) &&
         vector_reserve(&shard->pair_records, pairs, sizeof(pair_record), 0);
}

/* One shard's part of ngram_count. */
static bool count_shard(const ngram *s, int number, size_t n, ngram_out out) {
  ngram_shard *shard = &s->shard[number];
  const uint32_t *history = s->history.items;
  const size_t end = s->history.count;
  const size_t start = end - n;
  event events[BLOCK];
  size_t begin = start < (size_t)s->context ? (size_t)s->context : start; /* no hint before a full context */
  for (; begin < end; begin += BLOCK) {
    const size_t stop = end - begin < BLOCK ? end : begin + BLOCK;
    const int count = events_of(s, number, history, begin, stop, events);
    if (!reserve(s, shard, (size_t)count)) return false;
    const table *contexts = &shard->contexts, *pairs = &shard->pairs;
    for (int i = -BUCKET_AHEAD; i < count; ++i) {
      if (i + BUCKET_AHEAD < count) {
        const event *e = &events[i + BUCKET_AHEAD];
        __builtin_prefetch(&contexts->buckets[table_home(contexts, e->hash)], 1);
        if (!s->exact) __builtin_prefetch(&pairs->buckets[table_home(pairs, e->pair_hash)], 1);
      }
      if (i + RECORD_AHEAD >= 0 && i + RECORD_AHEAD < count) {
        const event *e = &events[i + RECORD_AHEAD];
        const bool seen_twice =
            prefetch_referred(contexts, e->hash, &shard->context_records, sizeof(context_record), s);
        if (!s->exact) {
          prefetch_referred(pairs, e->pair_hash, &shard->pair_records, sizeof(pair_record), s);
        } else if (seen_twice) {
          __builtin_prefetch(&pairs->buckets[table_home(pairs, e->pair_hash)], 1);
        }
      }
      if (i >= 0) take(s, shard, history, &events[i], events[i].position - start, out);
    }
  }
  return true;
}

typedef struct {
  const ngram *state;
  int shard;
  size_t n;
  ngram_out out;
  bool ok;
} job;

static void *run_job(void *argument) {
  job *j = argument;
  j->ok = count_shard(j->state, j->shard, j->n, j->out);
  return NULL;
}

bool ngram_count(ngram *s, size_t n, ngram_out out) {
  memset(out.hint, 0, n * sizeof *out.hint);
  memset(out.gate, 0, n);
  if (out.confidence) memset(out.confidence, 0, n * sizeof *out.confidence);
  if (s->expected < s->history.count) s->expected = s->history.count;
  job jobs[NGRAM_MAX_SHARDS];
  pthread_t threads[NGRAM_MAX_SHARDS];
  bool started[NGRAM_MAX_SHARDS] = {false};
  for (int i = 0; i < s->shards; ++i) {
    jobs[i] = (job){s, i, n, out, false};
    if (i > 0 && n >= SMALLEST_THREADED) started[i] = !pthread_create(&threads[i], NULL, run_job, &jobs[i]);
  }
  bool ok = true;
  for (int i = 0; i < s->shards; ++i) {
    if (started[i]) {
      pthread_join(threads[i], NULL);
    } else {
      run_job(&jobs[i]); /* the first shard is this thread's; so are those that got no thread */
    }
    ok = ok && jobs[i].ok;
  }
  return ok;
}

bool ngram_init(ngram *s, int context, bool exact, float threshold, uint64_t vocab_size, size_t expected,
                int shards) {
  *s = (ngram){.context = context, .exact = exact, .threshold = threshold, .vocab_size = vocab_size,
               .expected = expected, .shards = shards};
  for (uint64_t most = (vocab_size - 1) * COEFFICIENT[context]; most; most >>= 1) s->group_shift += 1;
  s->shard = calloc((size_t)shards, sizeof(ngram_shard));
  return s->shard != NULL;
}

void ngram_free(ngram *s) {
  for (int i = 0; s->shard && i < s->shards; ++i) {
    table_free(&s->shard[i].contexts);
    table_free(&s->shard[i].pairs);
    vector_free(&s->shard[i].context_records);
    vector_free(&s->shard[i].pair_records);
  }
  free(s->shard);
  vector_free(&s->history);
  s->shard = NULL;
}

bool ngram_extend(ngram *s, size_t n, uint32_t **tokens) {
  if (!vector_reserve(&s->history, n, sizeof(uint32_t), s->expected + SPARE_SEEDS)) return false;
  *tokens = n ? (uint32_t *)s->history.items + s->history.count : NULL;
  return true;
}

size_t ngram_bytes(const ngram *s) {
  size_t bytes = s->history.capacity * sizeof(uint32_t);
  for (int i = 0; i < s->shards; ++i) {
    const ngram_shard *shard = &s->shard[i];
    bytes += (shard->contexts.size + shard->pairs.size) * sizeof(bucket);
    bytes += shard->context_records.capacity * sizeof(context_record);
    bytes += shard->pair_records.capacity * sizeof(pair_record);
  }
  return bytes;
}

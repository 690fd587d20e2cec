#include "state.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* The published multipliers of a context's tokens, oldest first; the one after the last is the next token's. */
static const uint32_t COEFFICIENT[NGRAM_MAX_CONTEXT + 1] = {
    36313,   27191,   51647,   81929,   131071,  196613,  262147,  393241,  524309,  655373,  786433,
    917521,  1048583, 1179653, 1310729, 1441801, 1572869, 1703941, 1835017, 1966087, 2097169, 2228243,
    2359319, 2490389, 2621471, 2752549, 2883617, 3014687, 3145757, 3276833, 3407903, 3538973,
};
static const uint64_t PAIR = 1000003;

enum {
  BLOCK = 512,             /* targets whose keys are computed ahead */
  SLOT_AHEAD = 24,         /* targets between asking for a slot's cache line and using it */
  RECORD_AHEAD = 8,        /* the same for what the slot refers to */
  SMALLEST_THREADED = 8192 /* targets for which starting a thread pays */
};

/* A context or pair seen once is its position plus one. Seen again, it is RECORD plus the number of a record. */
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

static inline uint64_t mixed(uint64_t x) {
  x ^= x >> 32;
  x *= 0xd6e8feb86659fd93u;
  x ^= x >> 32;
  return x * 0xd6e8feb86659fd93u;
}

static inline uint64_t pair_key(const ngram *s, uint64_t key, uint32_t token) {
  return key * PAIR ^ (uint64_t)token * COEFFICIENT[s->context];
}

/* Keys of the contexts in front of `count` neighbouring targets; `first` is the oldest token of the first context.
   One coefficient at a time, so that the compiler can work on several targets at once. */
static void context_keys(const uint32_t *first, int context, int count, uint64_t *key) {
  memset(key, 0, (size_t)count * sizeof *key);
  for (int j = 0; j < context; ++j) {
    const uint32_t c = COEFFICIENT[j];
    for (int i = 0; i < count; ++i) key[i] ^= (uint64_t)first[i + j] * c;
  }
}

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
  return !s->exact && pair_key(s, key_at(s, history, old), history[old]) == e->pair_key;
}

/* Counts the pair once more; its count, this time included. */
static uint32_t count_pair(const ngram *s, ngram_shard *shard, const uint32_t *history, const event *e) {
  const table *t = &shard->pairs;
  pair_record *records = shard->pair_records.items;
  for (uint64_t i = table_home(t, e->pair_hash);; i = table_next(t, i)) {
    slot *at = &t->slots[i];
    if (!at->ref) {
      *at = (slot){e->pair_hash, e->position + 1};
      shard->pairs.count += 1;
      return 1;
    }
    if (at->hash != e->pair_hash) continue;
    if (at->ref & RECORD) {
      pair_record *record = &records[at->ref & ~RECORD];
      if (same_pair(s, history, record->position, e)) return record->count += 1;
    } else if (same_pair(s, history, at->ref - 1, e)) {
      const size_t number = shard->pair_records.count++;
      records[number] = (pair_record){e->position, 2};
      at->ref = RECORD | (uint32_t)number;
      return 2;
    }
  }
}

/* Gives the hint for one target and counts the target. */
static void take(const ngram *s, ngram_shard *shard, const uint32_t *history, const event *e, size_t out_at,
                 ngram_out out) {
  const table *t = &shard->contexts;
  context_record *records = shard->context_records.items;
  const uint32_t pair = count_pair(s, shard, history, e);
  context_record *record = NULL;
  uint64_t i = table_home(t, e->hash);
  for (; t->slots[i].ref; i = table_next(t, i)) {
    slot *at = &t->slots[i];
    if (at->hash != e->hash) continue;
    if (at->ref & RECORD) {
      record = &records[at->ref & ~RECORD];
      if (same_context(s, history, record->position, e)) break;
    } else if (same_context(s, history, at->ref - 1, e)) {
      const size_t number = shard->context_records.count++;
      record = &records[number];
      *record = (context_record){at->ref - 1, 1, 1};
      at->ref = RECORD | (uint32_t)number;
      break;
    }
  }
  slot *at = &t->slots[i];
  if (!at->ref) {
    shard->contexts.count += 1;
    at->hash = e->hash;
    if (pair == 1) {
      at->ref = e->position + 1;
    } else { /* another context had this pair key: the published scheme takes its count over */
      const size_t number = shard->context_records.count++;
      records[number] = (context_record){e->position, 1, pair};
      at->ref = RECORD | (uint32_t)number;
    }
    return;
  }
  const float confidence = (float)record->best / (float)record->total;
  if (out.confidence) out.confidence[out_at] = confidence;
  out.hint[out_at] = history[record->position];
  out.gate[out_at] = confidence >= s->threshold;
  record->total += 1;
  if (pair > record->best) {
    record->best = pair;
    record->position = e->position;
  }
}

/* Asks for the cache lines behind a slot: its record, or the tokens that it will be compared with. */
static inline void prefetch_referred(const table *t, uint32_t hash, const void *records, size_t width,
                                     const uint32_t *history, int context) {
  for (uint64_t i = table_home(t, hash); t->slots[i].ref; i = table_next(t, i)) {
    if (t->slots[i].hash != hash) continue;
    const uint32_t ref = t->slots[i].ref;
    if (ref & RECORD) {
      __builtin_prefetch((const char *)records + (ref & ~RECORD) * width);
    } else {
      __builtin_prefetch(history + ref - 1);
      __builtin_prefetch(history + ref - 1 - context);
    }
    return;
  }
}

/* Events of this shard among the targets at [begin, end) of the history. */
static int events_of(const ngram *s, int number, const uint32_t *history, size_t begin, size_t end, event *events) {
  uint64_t keys[BLOCK];
  const int count = (int)(end - begin);
  context_keys(history + begin - s->context, s->context, count, keys);
  int mine = 0;
  for (int i = 0; i < count; ++i) {
    const uint64_t mix = mixed(keys[i]);
    event *e = &events[mine];
    e->key = keys[i];
    e->pair_key = pair_key(s, keys[i], history[begin + i]);
    e->position = (uint32_t)(begin + i);
    e->hash = (uint32_t)(mix >> 32);
    e->pair_hash = (uint32_t)(mixed(e->pair_key) >> 32);
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

/* One shard's part of ngram_count. */
static bool count_shard(const ngram *s, int number, size_t n, ngram_out out) {
  ngram_shard *shard = &s->shard[number];
  const uint32_t *history = s->history.items;
  const size_t end = s->history.count;
  const size_t start = end - n;
  const uint64_t expected = s->expected / (uint64_t)s->shards;
  event events[BLOCK];
  size_t begin = start < (size_t)s->context ? (size_t)s->context : start; /* no hint before a full context */
  for (; begin < end; begin += BLOCK) {
    const size_t stop = end - begin < BLOCK ? end : begin + BLOCK;
    const int count = events_of(s, number, history, begin, stop, events);
    const size_t extra = (size_t)count;
    if (!table_reserve(&shard->contexts, extra, expected) || !table_reserve(&shard->pairs, extra, expected) ||
        !vector_reserve(&shard->context_records, extra, sizeof(context_record), 0) ||
        !vector_reserve(&shard->pair_records, extra, sizeof(pair_record), 0)) {
      return false;
    }
    const table *contexts = &shard->contexts, *pairs = &shard->pairs;
    for (int i = -SLOT_AHEAD; i < count; ++i) {
      if (i + SLOT_AHEAD < count) {
        const event *e = &events[i + SLOT_AHEAD];
        __builtin_prefetch(&contexts->slots[table_home(contexts, e->hash)], 1);
        __builtin_prefetch(&pairs->slots[table_home(pairs, e->pair_hash)], 1);
      }
      if (i + RECORD_AHEAD >= 0 && i + RECORD_AHEAD < count) {
        const event *e = &events[i + RECORD_AHEAD];
        prefetch_referred(contexts, e->hash, shard->context_records.items, sizeof(context_record), history,
                          s->context);
        prefetch_referred(pairs, e->pair_hash, shard->pair_records.items, sizeof(pair_record), history, s->context);
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

uint32_t *ngram_extend(ngram *s, size_t n) {
  if (!vector_reserve(&s->history, n, sizeof(uint32_t), s->expected)) return NULL;
  return (uint32_t *)s->history.items + s->history.count;
}

size_t ngram_bytes(const ngram *s) {
  size_t bytes = s->history.capacity * sizeof(uint32_t);
  for (int i = 0; i < s->shards; ++i) {
    const ngram_shard *shard = &s->shard[i];
    bytes += (shard->contexts.size + shard->pairs.size) * sizeof(slot);
    bytes += shard->context_records.capacity * sizeof(context_record);
    bytes += shard->pair_records.capacity * sizeof(pair_record);
  }
  return bytes;
}

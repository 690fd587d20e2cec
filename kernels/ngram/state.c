#include "state.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "keys.h"
#include "shard.h"

enum {
  SMALLEST_THREADED = 8192, /* targets for which starting a thread pays */
  SPARE_SEEDS = 64          /* seeds that the history has room for besides the expected targets */
};

typedef struct {
  const ngram *state;
  int shard;
  size_t n;
  ngram_out out;
  bool ok;
} job;

static void *run_job(void *argument) {
  job *j = argument;
  j->ok = shard_count(j->state, j->shard, j->n, j->out);
  return NULL;
}

bool ngram_count(ngram *s, size_t n, ngram_out out) {
  memset(out.hint, 0, n * sizeof *out.hint);
  memset(out.gate, 0, n);
  if (out.confidence) memset(out.confidence, 0, n * sizeof *out.confidence);
  if (out.total) memset(out.total, 0, n * sizeof *out.total);
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
               .expected = expected, .shards = shards, .group_shift = group_shift_of(vocab_size, context)};
  s->shard = calloc((size_t)shards, sizeof(ngram_shard));
  return s->shard != NULL;
}

void ngram_free(ngram *s) {
  for (int i = 0; s->shard && i < s->shards; ++i) shard_free(&s->shard[i]);
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
  for (int i = 0; i < s->shards; ++i) bytes += shard_bytes(&s->shard[i]);
  return bytes;
}

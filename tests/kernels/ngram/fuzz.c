/* Random streams through the counts of kernels/ngram, for the sanitizers of kernels/ngram/sanitize.sh.

   Checks that results do not depend on how a stream is cut or on the number of shards, and that a state which ran
   out of memory at any one allocation is freed whole. Link with --wrap=calloc,--wrap=realloc. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "state.h"

static long allocations_left = -1; /* -1: no limit */

void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *old, size_t size);

/* Threads may both see the last one; then one allocation more fails or succeeds, which is as good a test. */
static bool may_allocate(void) {
  long left = __atomic_load_n(&allocations_left, __ATOMIC_RELAXED);
  if (left > 0) __atomic_store_n(&allocations_left, left - 1, __ATOMIC_RELAXED);
  return left != 0;
}

void *__wrap_calloc(size_t count, size_t size) { return may_allocate() ? __real_calloc(count, size) : NULL; }

void *__wrap_realloc(void *old, size_t size) { return may_allocate() ? __real_realloc(old, size) : NULL; }

static uint64_t seed;

static uint64_t random_below(uint64_t n) {
  seed = seed * 6364136223846793005u + 1442695040888963407u;
  return (seed >> 33) % n;
}

typedef struct {
  int context;
  bool exact;
  uint64_t vocab_size;
  size_t n;
  size_t expected;
  uint32_t *tokens;
} stream;

/* Runs the stream through a new state. False where memory ran out, and then everything is freed all the same. */
static bool run(const stream *x, int shards, bool cut, ngram_out out) {
  ngram state;
  if (!ngram_init(&state, x->context, x->exact, 0.5f, x->vocab_size, x->expected, shards)) return false;
  bool ok = true;
  for (size_t done = 0; ok && done < x->n;) {
    size_t n = cut ? 1 + random_below(x->n) : x->n;
    if (n > x->n - done) n = x->n - done;
    uint32_t *room;
    ok = ngram_extend(&state, n, &room);
    if (!ok) break;
    memcpy(room, x->tokens + done, n * sizeof *room);
    state.history.count += n;
    ok = ngram_count(&state, n, (ngram_out){out.hint + done, out.gate + done, out.confidence + done});
    done += n;
  }
  ngram_free(&state);
  return ok;
}

static ngram_out new_out(size_t n) {
  /* Exactly n long, so that a write past the end is seen. */
  return (ngram_out){malloc(n * sizeof(uint32_t)), malloc(n), malloc(n * sizeof(float))};
}

static void free_out(ngram_out out) {
  free(out.hint);
  free(out.gate);
  free(out.confidence);
}

int main(int argc, char **argv) {
  const int rounds = argc > 1 ? atoi(argv[1]) : 300;
  long hints = 0, refusals = 0;
  for (int round = 0; round < rounds; ++round) {
    seed = (uint64_t)round;
    stream x = {.context = (int)random_below(NGRAM_MAX_CONTEXT + 1), .exact = random_below(2)};
    x.n = 1 + random_below(round % 50 ? 3000 : 40000); /* the longer ones are long enough for threads */
    x.vocab_size = 1 + (random_below(4) ? random_below(6) : random_below((uint64_t)1 << 31) * 2);
    x.expected = random_below(2) ? 0 : random_below(2 * x.n);
    x.tokens = malloc(x.n * sizeof *x.tokens);
    for (size_t i = 0; i < x.n; ++i) {
      const bool copied = i > 40 && random_below(8) != 0; /* enough repetition for long contexts to come again */
      x.tokens[i] = copied ? x.tokens[i - 40] : (uint32_t)random_below(x.vocab_size);
    }
    ngram_out whole = new_out(x.n), cut = new_out(x.n);
    if (!run(&x, 1, false, whole) || !run(&x, 1 + (int)random_below(5), true, cut)) {
      fprintf(stderr, "round %d: out of memory\n", round);
      return 1;
    }
    if (memcmp(whole.hint, cut.hint, x.n * sizeof *cut.hint) || memcmp(whole.gate, cut.gate, x.n) ||
        memcmp(whole.confidence, cut.confidence, x.n * sizeof *cut.confidence)) {
      fprintf(stderr, "round %d: cutting the stream or sharing it out changed the hints\n", round);
      return 1;
    }
    for (size_t i = 0; i < x.n; ++i) hints += whole.gate[i];
    for (int limit = 0;; ++limit) {
      allocations_left = limit;
      const bool ok = run(&x, 1 + (int)random_below(3), true, cut);
      allocations_left = -1;
      refusals += !ok;
      if (ok) break;
    }
    free_out(whole);
    free_out(cut);
    free(x.tokens);
  }
  printf("%d streams, %ld hints, %ld allocations refused\n", rounds, hints, refusals);
  return 0;
}

/* The Python type State around the counts of state.h, in the stable ABI of CPython 3.11 and later. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <string.h>

#include "state.h"

typedef struct {
  PyObject_HEAD
  ngram ngram;
  bool busy;   /* an update is running without the GIL */
  bool failed; /* an update ran out of memory half way */
} State;

/* Gets a one-dimensional contiguous buffer, or sets an exception. */
static bool get_buffer(PyObject *object, Py_buffer *view, int flags, const char *name) {
  if (PyObject_GetBuffer(object, view, flags | PyBUF_C_CONTIGUOUS | PyBUF_FORMAT)) return false;
  if (view->ndim == 1) return true;
  PyErr_Format(PyExc_ValueError, "%s must have one dimension, not %d", name, view->ndim);
  PyBuffer_Release(view);
  return false;
}

/* Returns the letter of a native element type, or 0. */
static char letter(const Py_buffer *view) {
  const char *format = view->format ? view->format : "B";
  if (*format == '@' || *format == '=') ++format;
  return format[0] && !format[1] ? format[0] : 0;
}

/* Gets an output of n elements of one of the `types`, or sets an exception. An `optional` None leaves it empty. */
static bool get_output(PyObject *object, Py_buffer *view, Py_ssize_t n, const char *types, Py_ssize_t width,
                       const char *name, bool optional) {
  view->buf = NULL;
  view->obj = NULL;
  if (optional && object == Py_None) return true;
  if (!get_buffer(object, view, PyBUF_WRITABLE, name)) return false;
  const char type = letter(view);
  if (type && strchr(types, type) && view->itemsize == width && view->len == n * width) return true;
  PyErr_Format(PyExc_ValueError, "%s must hold %zd elements of %zd bytes of type %s; it has %zd bytes of type '%s'",
               name, n, width, types, view->len, view->format ? view->format : "B");
  PyBuffer_Release(view);
  return false;
}

#define COPY(type)                                                  \
  do {                                                              \
    const type *from = view->buf;                                   \
    for (Py_ssize_t i = 0; i < n; ++i) {                            \
      to[i] = (uint32_t)from[i];                                    \
      bad |= (uint64_t)from[i] >= vocab_size;                       \
    }                                                               \
  } while (0)

/* Copies tokens of any integer type to `to`. Returns false if one of them is not in [0, vocab_size). */
static bool copy_tokens(uint32_t *to, const Py_buffer *view, Py_ssize_t n, uint64_t vocab_size) {
  const bool is_signed = strchr("bhilq", letter(view)) != NULL;
  bool bad = false;
  switch (view->itemsize) {
    case 2:
      if (is_signed) COPY(int16_t); else COPY(uint16_t);
      break;
    case 4:
      if (is_signed) COPY(int32_t); else COPY(uint32_t);
      break;
    default:
      if (is_signed) COPY(int64_t); else COPY(uint64_t);
  }
  return !bad;
}

/* Appends tokens to the history and returns their number, or sets an exception, changes nothing and returns -1. */
static Py_ssize_t extend(State *self, PyObject *tokens) {
  if (self->busy || self->failed) {
    PyErr_SetString(PyExc_RuntimeError, self->busy ? "this state is being updated by another thread"
                                                   : "this state ran out of memory; build a new one");
    return -1;
  }
  Py_buffer view;
  if (!get_buffer(tokens, &view, PyBUF_SIMPLE, "tokens")) return -1;
  Py_ssize_t n = -1;
  const char type = letter(&view);
  if (!type || !strchr("hHiIlLqQ", type)) {
    PyErr_Format(PyExc_TypeError, "tokens must be integers of 16, 32 or 64 bits, not of type '%s'",
                 view.format ? view.format : "B");
  } else if ((size_t)(view.len / view.itemsize) > NGRAM_MAX_TOKENS - self->ngram.history.count) {
    PyErr_Format(PyExc_OverflowError, "a state holds at most %zu tokens", NGRAM_MAX_TOKENS);
  } else {
    n = view.len / view.itemsize;
    uint32_t *to;
    if (!ngram_extend(&self->ngram, (size_t)n, &to)) {
      PyErr_NoMemory();
      n = -1;
    } else if (!copy_tokens(to, &view, n, self->ngram.vocab_size)) {
      PyErr_Format(PyExc_ValueError, "tokens must be in [0, %llu)", (unsigned long long)self->ngram.vocab_size);
      n = -1;
    } else {
      self->ngram.history.count += (size_t)n;
    }
  }
  PyBuffer_Release(&view);
  return n;
}

static PyObject *State_seed(State *self, PyObject *tokens) {
  if (extend(self, tokens) < 0) return NULL;
  Py_RETURN_NONE;
}

static PyObject *State_update(State *self, PyObject *args) {
  PyObject *tokens, *hint, *gate, *confidence = Py_None, *total = Py_None;
  if (!PyArg_ParseTuple(args, "OOO|OO:update", &tokens, &hint, &gate, &confidence, &total)) return NULL;
  const Py_ssize_t n = PyObject_Length(tokens);
  if (n < 0) return NULL;
  PyObject *result = NULL;
  Py_buffer hints, gates, confidences, totals;
  if (!get_output(hint, &hints, n, "iIlL", 4, "hint", false)) return NULL;
  if (!get_output(gate, &gates, n, "?B", 1, "gate", false)) goto release_hints;
  if (!get_output(confidence, &confidences, n, "f", 4, "confidence", true)) goto release_gates;
  if (!get_output(total, &totals, n, "iIlL", 4, "total", true)) goto release_confidences;
  const Py_ssize_t taken = extend(self, tokens);
  if (taken == n) {
    const ngram_out out = {hints.buf, gates.buf, confidences.buf, totals.buf};
    bool ok;
    self->busy = true;
    Py_BEGIN_ALLOW_THREADS;
    ok = ngram_count(&self->ngram, (size_t)n, out);
    Py_END_ALLOW_THREADS;
    self->busy = false;
    self->failed = !ok;
    result = ok ? Py_NewRef(Py_None) : PyErr_NoMemory();
  } else if (taken >= 0) {
    self->failed = true;
    PyErr_SetString(PyExc_RuntimeError, "the length of tokens changed during the call");
  }
  if (totals.obj) PyBuffer_Release(&totals);
release_confidences:
  if (confidences.obj) PyBuffer_Release(&confidences);
release_gates:
  PyBuffer_Release(&gates);
release_hints:
  PyBuffer_Release(&hints);
  return result;
}

static PyObject *State_new(PyTypeObject *type, PyObject *args, PyObject *keywords) {
  static char *names[] = {"context", "exact", "threshold", "vocab_size", "expected", "shards", NULL};
  int context, exact, shards;
  float threshold;
  unsigned long long vocab_size;
  Py_ssize_t expected;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "ipfKni:State", names, &context, &exact, &threshold, &vocab_size,
                                   &expected, &shards)) {
    return NULL;
  }
  if (context < 0 || context > NGRAM_MAX_CONTEXT || isnan(threshold) || vocab_size < 1 || vocab_size > 1ull << 32 ||
      expected < 0 || (size_t)expected > NGRAM_MAX_TOKENS || shards < 1 || shards > NGRAM_MAX_SHARDS) {
    PyErr_Format(PyExc_ValueError,
                 "need 0 <= context <= %d, a threshold that is a number, 1 <= vocab_size <= 2**32, "
                 "0 <= expected <= %zu, 1 <= shards <= %d",
                 NGRAM_MAX_CONTEXT, NGRAM_MAX_TOKENS, NGRAM_MAX_SHARDS);
    return NULL;
  }
  allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
  State *self = (State *)allocate(type, 0);
  if (!self) return NULL;
  if (!ngram_init(&self->ngram, context, exact, threshold, vocab_size, (size_t)expected, shards)) {
    Py_DECREF(self);
    return PyErr_NoMemory();
  }
  return (PyObject *)self;
}

static void State_dealloc(State *self) {
  PyTypeObject *type = Py_TYPE((PyObject *)self);
  ngram_free(&self->ngram);
  freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
  release(self);
  Py_DECREF(type);
}

static PyObject *State_nbytes(State *self, void *unused) {
  (void)unused;
  if (self->busy) return PyErr_Format(PyExc_RuntimeError, "this state is being updated by another thread");
  return PyLong_FromSize_t(ngram_bytes(&self->ngram));
}

static PyObject *State_last(State *self, void *unused) {
  (void)unused;
  const vector *history = &self->ngram.history;
  if (self->busy) return PyErr_Format(PyExc_RuntimeError, "this state is being updated by another thread");
  if (!history->count) Py_RETURN_NONE;
  return PyLong_FromUnsignedLong(((const uint32_t *)history->items)[history->count - 1]);
}

static PyMethodDef methods[] = {
    {"seed", (PyCFunction)State_seed, METH_O, "seed(tokens): append tokens that serve as context and are not counted"},
    {"update", (PyCFunction)State_update, METH_VARARGS,
     "update(tokens, hint, gate, confidence=None, total=None): write the hints of tokens into the arrays, and count the tokens"},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef attributes[] = {
    {"nbytes", (getter)State_nbytes, NULL, "bytes allocated", NULL},
    {"last", (getter)State_last, NULL, "the newest token, or None", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot type_slots[] = {
    {Py_tp_doc, "State(context, exact, threshold, vocab_size, expected, shards)"},
    {Py_tp_new, State_new},
    {Py_tp_dealloc, State_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_getset, attributes},
    {0, NULL},
};

static PyType_Spec type_spec = {
    .name = "pgolf_jax.kernels.ngram._ngram.State",
    .basicsize = sizeof(State),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = type_slots,
};

static int execute(PyObject *module) {
  PyObject *type = PyType_FromModuleAndSpec(module, &type_spec, NULL);
  if (!type) return -1;
  const int failed = PyModule_AddType(module, (PyTypeObject *)type);
  Py_DECREF(type);
  return failed;
}

static PyModuleDef_Slot module_slots[] = {{Py_mod_exec, execute}, {0, NULL}};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_ngram",
    .m_doc = "Streaming n-gram counts.",
    .m_size = 0,
    .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__ngram(void) { return PyModuleDef_Init(&definition); }

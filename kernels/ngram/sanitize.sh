#!/bin/sh
# Runs the n-gram counts under AddressSanitizer, LeakSanitizer and UndefinedBehaviorSanitizer, then under
# ThreadSanitizer: first the C alone (tests/kernels/ngram/fuzz.c, in which every allocation fails once), then the
# Python type with the tests of tests/kernels/ngram.
# Use: kernels/ngram/sanitize.sh [streams]     needs gcc or clang with its sanitizer libraries; one to two minutes.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
cc=${CC:-cc}
python=${PYTHON:-python}
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

flags="-std=gnu11 -g -O1 -Wall -Wextra -fno-omit-frame-pointer -fno-sanitize-recover=all -I$here"
sources="$here/shard.c $here/state.c $here/table.c"
fuzz="$root/tests/kernels/ngram/fuzz.c $sources -Wl,--wrap=calloc,--wrap=realloc -pthread"

echo "== C, addresses, leaks and undefined behaviour"
$cc $flags -fsanitize=address,undefined -o "$build/fuzz" $fuzz
ASAN_OPTIONS=detect_leaks=1 "$build/fuzz" "${1:-300}"

echo "== C, threads"
$cc $flags -fsanitize=thread -o "$build/fuzz_threads" $fuzz
"$build/fuzz_threads" "${1:-300}"

echo "== Python type, addresses, leaks and undefined behaviour"
include=$("$python" -c "import sysconfig; print(sysconfig.get_path('include'))")
$cc $flags -fsanitize=address,undefined -shared -fPIC -DPy_LIMITED_API=0x030B0000 "-I$include" \
  -o "$build/_ngram.abi3.so" "$here/_ngram.c" $sources -pthread
cat >"$build/run.py" <<'EOF'
import importlib.util, sys
import pytest
name = "pgolf_jax.kernels.ngram._ngram"  # instead of the installed one
spec = importlib.util.spec_from_file_location(name, sys.argv[1])
sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[name])
status = pytest.main(["-q", "-p", "no:cacheprovider", sys.argv[2]])
assert sys.modules[name].__file__ == sys.argv[1]
sys.exit(status)
EOF
status=0
PYTHONMALLOC=malloc LD_PRELOAD=$($cc -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=1 \
  LSAN_OPTIONS=exitcode=0 "$python" "$build/run.py" "$build/_ngram.abi3.so" "$root/tests/kernels/ngram" \
  >"$build/log" 2>&1 || status=$?
# The interpreter itself leaks memory; only what this extension allocated counts.
if [ $status -ne 0 ] || grep -qE "ERROR: AddressSanitizer|runtime error|/(_ngram|shard|state|table)\.[ch]:" "$build/log"; then
  cat "$build/log"
  exit 1
fi
grep -E "passed" "$build/log"
echo "clean"

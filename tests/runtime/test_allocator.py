import json
import os
import subprocess
import sys

import pytest

from pgolf_jax.runtime import allocator


@pytest.fixture
def call(tmp_path):
  """Calls the function as on a machine with huge pages and without a GPU; returns how it would start again."""

  def call(environ, *, pages="always [madvise] never\n", driver=False):
    (tmp_path / "enabled").write_text(pages)
    if driver:
      (tmp_path / "driver").touch()
    calls = []
    places = {"kernel": tmp_path / "enabled", "driver": tmp_path / "driver"}
    allocator.use_huge_pages(environ, lambda *arguments: calls.append(arguments), **places)
    return calls

  return call


needs_glibc = pytest.mark.skipif(not allocator._is_glibc(), reason="needs glibc")


@needs_glibc
def test_starts_again_once_with_what_was_set_before(call):
  [(program, arguments, environ)] = call({"A": "b", "GLIBC_TUNABLES": "glibc.rtld.nns=4"})
  assert (program, arguments) == (sys.executable, sys.orig_argv)
  assert environ["A"] == "b"
  assert environ["GLIBC_TUNABLES"].startswith("glibc.rtld.nns=4:glibc.malloc.hugetlb=1:")
  assert not call(environ)


def test_leaves_alone_what_somebody_has_set(call):
  assert not call({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=128"})


def test_does_nothing_without_huge_pages_or_beside_a_gpu(call):
  assert not call({}, pages="always madvise [never]\n")
  assert not call({}, driver=True)


@needs_glibc
def test_a_process_that_starts_again_has_its_arguments_and_the_tunables(tmp_path):
  (tmp_path / "enabled").write_text("[always] madvise never\n")
  code = f"""
import json, os, pathlib, sys
from pgolf_jax.runtime import allocator
here = pathlib.Path({str(tmp_path)!r})
allocator.use_huge_pages(kernel=here / "enabled", driver=here / "driver")
print(json.dumps([sys.argv[1:], os.environ["GLIBC_TUNABLES"], os.getpid()]))
"""
  environ = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
  process = subprocess.Popen([sys.executable, "-c", code, "a b"], env=environ, stdout=subprocess.PIPE, text=True)
  arguments, tunables, pid = json.loads(process.communicate()[0])
  assert arguments == ["a b"]
  assert tunables == ":".join(f"{name}={value}" for name, value in allocator.TUNABLES.items())
  assert pid == process.pid

"""Terminals, files and pipes of every kind."""

import os
import subprocess
import sys

import pytest

from pgolf_jax.cli import main
from pgolf_jax.errors import of_the_system

PGOLF = [sys.executable, "-m", "pgolf_jax"]


def run(command, **environ):
  return subprocess.run(["bash", "-c", command], capture_output=True, env=os.environ | environ)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_help_is_readable_in_every_encoding(encoding):
  done = run(f"{' '.join(PGOLF)} help settings", PYTHONIOENCODING=encoding)
  assert done.returncode == 0 and not done.stderr
  text = done.stdout.decode(encoding)
  assert ("√(layer + 1)" if encoding == "utf-8" else "sqrt(layer + 1)") in text and "?" not in text


def test_a_reader_that_has_seen_enough_is_no_error():
  done = run(f"set -o pipefail; {' '.join(PGOLF)} help settings | true")
  assert done.returncode == 141 and not done.stderr


def test_a_full_disk_behind_standard_output_is_one_sentence():
  done = run(f"{' '.join(PGOLF)} help settings > /dev/full")
  assert (
    done.returncode == 1 and done.stderr.startswith(b"pgolf: no room on the disk") and done.stderr.count(b"\n") == 1
  )


def test_closed_streams_are_no_error():
  assert run(f"{' '.join(PGOLF)} --help >&- 2>&-").returncode == 0


@pytest.mark.parametrize(
  "error, part",
  [
    (PermissionError(13, "Permission denied", "runs/demo"), "runs/demo may not be read or written"),
    (NotADirectoryError(20, "Not a directory", "a.toml/x"), "a.toml/x leads through a file where a folder is needed"),
    (IsADirectoryError(21, "Is a directory", "runs"), "runs is a folder where a file is needed"),
    (FileExistsError(17, "File exists", "runs"), "runs is a file where a folder is needed"),
    (OSError(30, "Read-only file system", "runs"), "runs lies on a disk that cannot be written"),
    (MemoryError(), "not enough memory"),
    (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), "not enough memory"),
  ],
)
def test_errors_of_the_system_are_sentences(error, part):
  assert of_the_system(error).startswith(part)
  try:
    raise ValueError("a library's own") from error
  except ValueError as passed_on:
    assert of_the_system(passed_on).startswith(part)
  assert of_the_system(ValueError("another")) is None


@pytest.mark.parametrize(
  "name, verb", [("QUANTIZE_ONLY", "quantize"), ("PREQUANT_ONLY", "train"), ("TTT_EVAL_ONLY", "eval")]
)
def test_switches_of_the_pytorch_script_are_refused_in_front_of_other_verbs(name, verb, monkeypatch, capsys):
  monkeypatch.setenv(name, "1")
  assert main(["run", "demo"]) == 1
  assert f"which is `pgolf {verb} " in capsys.readouterr().err
  assert main([verb, "--help"]) == 0
  monkeypatch.setenv(name, "0")
  assert main(["run", "nowhere.toml"]) == 1
  assert "There is no config file nowhere.toml" in capsys.readouterr().err

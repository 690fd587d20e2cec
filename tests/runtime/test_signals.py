"""No signal is lost, wherever it comes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from children import environment

from pgolf_jax.runtime.signals import Ended, ending_signals, postponed_signals

SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]


@pytest.mark.parametrize("signum, status", SIGNALS)
def test_a_signal_ends_the_block_with_its_status(signum, status):
  handler = signal.getsignal(signum)
  with pytest.raises(Ended) as ended, ending_signals():
    signal.raise_signal(signum)
  assert ended.value.status == status
  assert signal.getsignal(signum) is handler and signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_signal_that_a_library_swallows_comes_again():
  with pytest.raises(Ended) as ended, ending_signals():
    with contextlib.suppress(BaseException):  # as Python does while a finaliser runs
      signal.raise_signal(signal.SIGTERM)
    time.sleep(5)
  assert ended.value.status == 143


def test_a_signal_that_a_library_makes_another_error_of_keeps_its_status():
  with pytest.raises(Ended) as ended, ending_signals():
    try:
      signal.raise_signal(signal.SIGTERM)
    except BaseException as error:
      raise ValueError("the callback failed") from error
  assert ended.value.status == 143
  with pytest.raises(ValueError, match="without a signal"), ending_signals():
    raise ValueError("without a signal")


@pytest.mark.parametrize("signum, status", SIGNALS)
def test_a_postponed_signal_that_nobody_asks_for_ends_the_program(signum, status):
  with pytest.raises(Ended) as ended, ending_signals(), postponed_signals() as arrived:
    assert arrived() == 0
    signal.raise_signal(signum)
  assert ended.value.status == status


def test_a_postponed_signal_is_told_and_the_second_one_ends_at_once():
  with ending_signals(), postponed_signals() as arrived:
    signal.raise_signal(signal.SIGTERM)
    assert arrived() == signal.SIGTERM
  with pytest.raises(Ended), ending_signals(), postponed_signals():
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)


PROGRAM = """
import sys, time
from pgolf_jax import cli
def command():
  "Waits."
  print("ready", flush=True)
  time.sleep(60)
cli.commands = lambda verb: {"": command}
sys.exit(cli.main(["package"]))
"""


@pytest.mark.parametrize("signum, status", SIGNALS)
def test_a_verb_that_saves_nothing_ends_with_the_status_too(signum, status):
  process = subprocess.Popen(
    [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
  )
  assert process.stdout.readline() == "ready\n"
  process.send_signal(signum)
  error = process.communicate(timeout=30)[1]
  assert process.returncode == status and error.count("\n") == 1 and "the same command begins anew" in error


STUCK = """
import hashlib, sys
from pgolf_jax import cli
from pgolf_jax.runtime.log import progress
def command():
  "Computes outside of Python, as a compiler does."
  with progress("compiling"):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"x", b"y", 400_000_000)
cli.commands = lambda verb: {"": command}
sys.exit(cli.main(["package"]))
"""


def wait_for_work(pid: int) -> None:
  """Waits until a process has computed for half a second more, so that it has left Python for long."""
  statistics = Path(f"/proc/{pid}/stat")
  if not statistics.exists():
    time.sleep(3)
    return

  def ticks() -> int:
    return int(statistics.read_text().rpartition(")")[2].split()[11])

  begun, end = ticks(), time.monotonic() + 60
  while ticks() < begun + os.sysconf("SC_CLK_TCK") // 2 and time.monotonic() < end:
    time.sleep(0.05)


def test_a_stop_that_must_wait_says_for_what_and_the_next_one_ends_it():
  process = subprocess.Popen(
    [sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
  )
  assert process.stdout.readline() == "ready\n"
  wait_for_work(process.pid)
  began = time.monotonic()
  process.send_signal(signal.SIGINT)
  assert process.stderr.readline() == (
    "pgolf: SIGINT: waits for what cannot be interrupted (compiling), then stops; once more ends it at once.\n"
  )
  assert time.monotonic() - began < 5
  process.send_signal(signal.SIGINT)
  assert "stopped at once" in process.communicate(timeout=10)[1] and process.returncode == 130


ONE_OF_TWO = """
import os, signal, sys
from pgolf_jax.runtime import distributed, signals
from pgolf_jax.runtime.clock import Clock
distributed.initialize()
clock = Clock()
with signals.postponed_signals() as arrived:
  clock.start()
  for turn in range(1, 6):
    seconds, signum = clock.agreed_with(arrived())
    if signum:
      break
    if turn == 2 and os.environ["JAX_PROCESS_ID"] == sys.argv[1]:
      signal.raise_signal(signal.SIGTERM)
print("stopped", turn, signum, seconds, flush=True)
"""


@pytest.mark.parametrize("index", [0, 1])
def test_a_signal_to_any_of_several_processes_stops_all_at_the_same_turn(index):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  each = [{"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(i)} for i in range(2)]
  command = [sys.executable, "-c", ONE_OF_TWO, str(index)]
  processes = [subprocess.Popen(command, env=environment(**of), stdout=subprocess.PIPE, text=True) for of in each]
  try:
    said = [process.communicate(timeout=120)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  first, second = (next(line for line in text.splitlines() if "stopped" in line).split("stopped")[1] for text in said)
  assert first == second and first.split()[:2] == ["3", str(int(signal.SIGTERM))]

"""The program's log: lines on the terminal and, with times, in a file."""

import logging
import sys
import time
from pathlib import Path

from pgolf_jax.runtime import distributed

log = logging.getLogger("pgolf")


def log_to(path: Path) -> None:
  """Sends log lines to the terminal and, with times in UTC, to the file `path`; only the leader's lines are kept."""
  log.propagate = False
  log.setLevel(logging.INFO)
  if not distributed.is_leader():
    log.handlers = [logging.NullHandler()]
    return
  to_file = logging.FileHandler(path, encoding="utf-8")
  formatter = logging.Formatter("%(asctime)sZ %(message)s", datefmt="%Y-%m-%dT%H:%M:%S")
  formatter.converter = time.gmtime
  to_file.setFormatter(formatter)
  to_terminal = logging.StreamHandler(sys.stdout)
  to_terminal.setFormatter(logging.Formatter("%(message)s"))
  log.handlers = [to_file, to_terminal]

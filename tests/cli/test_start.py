"""Before its first look at a device, every verb that computes has told XLA its options and found its processes."""

import os
import subprocess
import sys

import jax
import pytest
import tomli_w

from pgolf_jax.cli import VERBS, main
from pgolf_jax.errors import UserError
from pgolf_jax.runtime import distributed, jax_setup
from pgolf_jax.settings import Settings
from pgolf_jax.settings.load import to_dict


class Started(UserError):
  pass


@pytest.fixture
def stop_at_the_start(monkeypatch):
  """Verbs stop where they would start JAX, and fail if they look at a device before."""

  def stop():
    raise Started("started")

  def looked(*_, **__):
    raise AssertionError("a device was looked at before the start")

  monkeypatch.setattr(distributed, "start", stop)
  monkeypatch.setattr(distributed, "leave_devices", stop)
  for name in ("devices", "local_devices", "device_count", "process_index", "process_count"):
    monkeypatch.setattr(jax, name, looked)


@pytest.fixture
def run(tmp_path):
  """A run folder with its config, trained as far as its results say."""
  (tmp_path / "config.toml").write_text(tomli_w.dumps(to_dict(Settings())))
  (tmp_path / "results.json").write_text('{"train": {"steps": 1}}')
  return tmp_path


COMMANDS = {
  "run": ["configs/demo.toml", "--out", "RUN/new"],
  "train": ["configs/demo.toml", "--out", "RUN/new"],
  "quantize": ["RUN"],
  "eval": ["RUN"],
  "audit": ["RUN"],
  "judge": ["RUN", "--data", "RUN"],
  "package": ["RUN"],
  "parity": ["check", "RUN"],
  "bench": ["step", "configs/demo.toml"],
  "generate": ["RUN"],
}
NO_DEVICES = {"configs", "convert", "data", "doctor", "plan", "report", "runs"}


def test_every_verb_is_looked_at_here():
  assert COMMANDS.keys() | NO_DEVICES == VERBS.keys()


@pytest.mark.parametrize("verb", COMMANDS)
def test_verbs_start_before_they_look(verb, stop_at_the_start, run, capsys):
  with pytest.raises(Started):
    main([verb, *(word.replace("RUN", str(run)) for word in COMMANDS[verb]), "--debug"])


@pytest.mark.parametrize(
  "what", [["kernels"], ["ttt", "configs/demo.toml"], ["start", "configs/demo.toml"], ["quantize", "RUN"]]
)
def test_benchmarks_do_too(what, stop_at_the_start, run):
  with pytest.raises(Started):
    main(["bench", *(word.replace("RUN", str(run)) for word in what), "--debug"])


def test_the_start_is_all_three(monkeypatch):
  done = []
  monkeypatch.setattr(jax_setup, "set_xla_options", lambda: done.append("options"))
  monkeypatch.setattr(distributed, "initialize", lambda: done.append("processes"))
  monkeypatch.setattr("pgolf_jax.runtime.jax_setup.use_compile_cache", lambda: done.append("cache"))
  distributed.start()
  assert done == ["options", "processes", "cache"]


@pytest.mark.parametrize("leader", [True, False])
def test_of_several_processes_the_leader_alone_prints(leader, monkeypatch, capsys):
  monkeypatch.setattr(distributed, "initialize", lambda: None)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(jax, "process_index", lambda: 0 if leader else 1)
  monkeypatch.setattr(sys, "stdout", sys.stdout)  # restored afterwards
  distributed.start()
  print("heard")
  assert capsys.readouterr().out == ("heard\n" if leader else "")


def test_a_process_that_leaves_the_devices_sees_cpus_alone():
  program = (
    "from pgolf_jax.runtime import distributed; distributed.leave_devices(); import jax, os;"
    "print(jax.config.jax_platforms, jax.default_backend(), os.environ['JAX_PLATFORMS'])"
  )
  # Children see what this process was told, not what it takes.
  environment = os.environ | {"JAX_PLATFORMS": "tpu,cpu"}
  said = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
  assert said.stdout.split() == ["cpu", "cpu", "tpu,cpu"]


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize backend 'cuda'")])
def test_a_device_that_is_not_there_is_one_sentence(error, monkeypatch, capsys, run):
  def no_backend():
    raise error

  monkeypatch.setattr(distributed, "initialize", lambda: None)
  monkeypatch.setattr(jax, "process_count", no_backend)
  monkeypatch.setenv("JAX_PLATFORMS", "cuda")
  assert main(["eval", str(run)]) == 1
  said = capsys.readouterr().err
  assert said.startswith("pgolf: JAX_PLATFORMS=cuda asks for a device that is not here") and said.count("\n") == 1

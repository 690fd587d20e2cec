"""Launch recipes and XLA's options, as far as they can be held to something without a cluster."""

import os
import re
import subprocess
import sys
from pathlib import Path

from pgolf_jax.runtime import jax_setup
from pgolf_jax.settings import check
from pgolf_jax.settings.load import from_toml

CONFIGS = Path(__file__).parents[2] / "configs"


def test_the_flags_are_known_to_this_jax():
  """XLA ends the process at a flag that it does not know."""
  flags = " ".join(f"{name}={value}" for name, value in jax_setup.GPU_FLAGS.items())
  command = [sys.executable, "-c", "import jax; print(float(jax.jit(lambda x: x + 1)(1.0)))"]
  for given, good in ((flags, True), (flags + " --xla_gpu_no_such_flag=true", False)):
    found = subprocess.run(command, env=os.environ | {"XLA_FLAGS": given}, capture_output=True, text=True)
    assert (found.returncode == 0) is good, found.stderr


def test_what_the_user_set_stays(tmp_path):
  driver = tmp_path / "driver"
  driver.touch()
  name = next(iter(jax_setup.GPU_FLAGS))
  environ = {"XLA_FLAGS": f"{name}=false --xla_dump_to=x"}
  jax_setup.set_xla_options(environ, driver=driver)
  assert environ["XLA_FLAGS"].split().count(f"{name}=false") == 1
  assert f"{name}=true" not in environ["XLA_FLAGS"] and "--xla_dump_to=x" in environ["XLA_FLAGS"]
  environ = {}
  jax_setup.set_xla_options(environ, driver=driver)
  assert environ["XLA_FLAGS"] == " ".join(f"{n}={v}" for n, v in jax_setup.GPU_FLAGS.items())


def test_no_flag_is_set_without_a_driver(tmp_path):
  environ = {"PJRT_NPROC": "3"}
  jax_setup.set_xla_options(environ, driver=tmp_path / "none")
  assert environ == {"PJRT_NPROC": "3"}


def test_the_slurm_recipe_starts_as_many_processes_as_the_config_has_rows(tmp_path):
  script = CONFIGS / "launch" / "slurm.sbatch"
  (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
  (tmp_path / "srun").chmod(0o755)
  environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
  command = ["bash", script, "configs/record_8xh100.toml", "runs/a b", "--seed", "0"]
  said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
  assert said[1:] == ["pgolf", "run", "configs/record_8xh100.toml", "--out", "runs/a b", "--seed", "0"]
  tasks = int(re.search(r"--ntasks-per-node=(\d+)", script.read_text())[1])
  gpus = int(re.search(r"--gres=gpu:h100:(\d+)", script.read_text())[1])
  assert tasks == gpus
  check.check(from_toml(CONFIGS / "record_8xh100.toml"), device_count=tasks)


def test_the_gke_recipe_has_the_chips_of_its_topology_and_a_config_for_them():
  text = (CONFIGS / "launch" / "gke.yaml").read_text()
  hosts = int(re.search(r"completions: (\d+)", text)[1])
  assert hosts == int(re.search(r"parallelism: (\d+)", text)[1])
  chips = {int(n) for n in re.findall(r"google.com/tpu: (\d+)", text)}
  rows, columns = re.search(r"gke-tpu-topology: (\d+)x(\d+)", text).groups()
  assert {hosts * n for n in chips} == {int(rows) * int(columns)}
  config = re.search(r"configs/(\S+\.toml), --out", text)[1]
  check.check(from_toml(CONFIGS / config), device_count=int(rows) * int(columns))

"""`pgolf doctor`: what is here, what is missing, the command that mends it; it never hangs."""

import importlib.metadata
import json
import re
import subprocess
import time
from types import SimpleNamespace

import pytest

from pgolf_jax import doctor
from pgolf_jax.cli import main
from pgolf_jax.doctor import Card

WELL = {"platform": "cpu", "kind": "cpu", "count": 1, "memory": None, "error": 1e-7, "warnings": ""}
T4 = Card("Tesla T4", "550.54.15", 16 << 30, 7.5)
H100 = Card("NVIDIA H100 80GB HBM3", "580.65.06", 80 << 30, 9.0)
OLD = Card("Tesla V100", "470.1", 16 << 30, 7.0)


@pytest.fixture
def installed(monkeypatch):
  """Makes packages seem installed in given versions, or not at all (None)."""
  real, pretended = importlib.metadata.version, {}

  def version(name):
    if name not in pretended:
      return real(name)
    if pretended[name] is None:
      raise importlib.metadata.PackageNotFoundError(name)
    return pretended[name]

  monkeypatch.setattr(importlib.metadata, "version", version)
  for package in ("jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvcc"):
    pretended[package] = None
  return pretended


def states(findings):
  return {finding.name: finding.state for finding in findings}


def only(findings, name):
  (finding,) = [finding for finding in findings if finding.name == name]
  return finding


def test_the_table_and_the_json_say_the_same(capsys, monkeypatch):
  monkeypatch.setattr(doctor, "probe", lambda seconds: WELL)
  monkeypatch.setattr(doctor, "nvidia_cards", lambda: None)
  assert main(["doctor"]) == 0
  table = capsys.readouterr().out
  assert main(["doctor", "--json"]) == 0
  findings = json.loads(capsys.readouterr().out)
  assert {"versions", "devices", "storage", "machine", "data", "extras"} <= {f["part"] for f in findings}
  assert all(f["name"] in table for f in findings) and "Everything works" in table
  assert all(f["mend"] for f in findings if f["state"] in ("warn", "fail"))
  assert {"python", "jax", "numpy", "JAX's devices", "compile cache", "n-grams in C"} <= {f["name"] for f in findings}


@pytest.mark.parametrize("columns", [40, 80])
def test_the_table_fits_the_terminal(columns, capsys, monkeypatch):
  monkeypatch.setattr(doctor, "probe", lambda seconds: {"failure": "JAX cannot use a device: " + "reason " * 20})
  monkeypatch.setattr(doctor, "nvidia_cards", lambda: "nvidia-smi failed: no driver")
  monkeypatch.setenv("COLUMNS", str(columns))
  assert main(["doctor"]) == 1
  lines = capsys.readouterr().out.splitlines()
  long = [line for line in lines if len(line) > columns and "/" not in line]
  assert long == []
  assert re.search(r"^2 of \d+ do not work", "\n".join(lines), re.M)


def test_a_real_device_is_shown():
  said = doctor.probe(120.0)
  assert said["platform"] == "cpu" and said["error"] < 0.01 * doctor._LARGEST_ERROR


@pytest.mark.parametrize(
  "mask",
  [
    "places[:, None] >= -1",
    "places[:, None] > places[None, :] - 2",
    "(places[:, None] >= places[None, :]) & (places[:, None] < places[None, :] + 32)",
    "(places[:, None] >= places[None, :]) & ((places[None, :] // 16 != 1) | (places[:, None] < 40))",
    "(places[:, None] >= places[None, :]) | (places[:, None] >= 32)",
  ],
)
def test_a_mask_that_a_compiler_gets_wrong_is_found(mask):
  right = "places[:, None] >= places[None, :]"
  assert doctor._PROBE.count(right) == 1
  said = doctor.probe(120.0, doctor._PROBE.replace(right, mask))
  assert said["error"] > 10 * doctor._LARGEST_ERROR
  assert states(doctor.devices(said, None, 120.0))["a causal mask"] == "fail"


def test_a_device_that_hangs_costs_its_seconds_and_leaves_no_process():
  began = time.monotonic()
  program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(61.5)'])"
  said = doctor.probe(3.0, program)
  assert time.monotonic() - began < 20
  (finding,) = doctor.devices(said, [T4], 3.0)
  assert finding.state == "fail" and "has not shown a device in 3 s" in finding.finding
  assert "JAX_PLATFORMS=cpu" in finding.mend and "--seconds 12" in finding.mend

  def remains() -> bool:
    return "time.sleep(61.5)" in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout

  end = time.monotonic() + 10  # a killed process is listed until it is reaped
  while remains() and time.monotonic() < end:
    time.sleep(0.1)
  assert not remains()


def test_a_device_that_fails_says_why():
  said = doctor.probe(60.0, "raise RuntimeError('no kernel image is available')")
  (finding,) = doctor.devices(said, None, 60.0)
  assert finding.state == "fail" and "no kernel image is available" in finding.finding


def test_a_device_that_computes_wrongly_is_found():
  found = states(doctor.devices(WELL | {"platform": "gpu", "kind": "Tesla T4", "error": 0.5}, [T4], 60.0))
  assert found == {"JAX's devices": "ok", "a causal mask": "fail"}


def test_a_gpu_that_jax_passes_over_is_a_failure(monkeypatch):
  monkeypatch.delenv("JAX_PLATFORMS", raising=False)
  finding = only(doctor.devices(WELL | {"warnings": "CUDA_ERROR_NO_DEVICE\n"}, [T4], 60.0), "JAX's devices")
  assert finding.state == "fail" and "Tesla T4" in finding.finding and "CUDA_ERROR_NO_DEVICE" in finding.finding


@pytest.mark.parametrize(
  ("cards", "plugins", "state", "mend"),
  [
    ([T4], {}, "fail", "pip install 'pgolf_jax[cuda12]'"),
    ([H100], {}, "fail", "pip install 'pgolf_jax[cuda13]'"),
    ([T4], {13: "SAME"}, "fail", "pip install 'pgolf_jax[cuda12]'"),
    ([OLD], {12: "SAME"}, "fail", "update the NVIDIA driver to 525 or newer"),
    ([H100], {13: "0.1.0"}, "fail", "pip install 'jax-cuda13-plugin=="),
    ([H100], {13: "SAME"}, "ok", ""),
    (None, {13: "SAME"}, "note", ""),
  ],
)
def test_driver_card_and_plugin_have_to_fit(cards, plugins, state, mend, installed):
  same = importlib.metadata.version("jaxlib")
  installed.update({f"jax-cuda{cuda}-plugin": same if v == "SAME" else v for cuda, v in plugins.items()})
  finding = only(doctor.drivers(cards), "CUDA plugin")
  assert finding.state == state and finding.mend.startswith(mend)


@pytest.mark.parametrize(
  ("ptxas", "hopper", "words"),
  [
    ("12.6.77", True, "gathers wrongly on Hopper"),
    ("12.6.77", False, ""),
    ("12.6.85", True, ""),
    ("12.8.61", False, "causal masks wrongly"),
    ("12.9.41", False, "causal masks wrongly"),
    ("12.9.86", True, ""),
    ("13.0.48", True, ""),
  ],
)
def test_compilers_that_compile_wrongly_are_known(ptxas, hopper, words):
  said = doctor.miscompiles(ptxas, hopper=hopper)
  assert words in said and bool(said) == bool(words)


@pytest.mark.parametrize(
  ("answer", "expected"),
  [
    ("Tesla T4, 550.54.15, 15360, 7.5\nTesla T4, 550.54.15, 15360, 7.5\n", 2),
    ("Tesla T4, 550.54.15, [N/A], 7.5\n", "cannot be read"),
  ],
)
def test_what_nvidia_smi_says_is_read(answer, expected, monkeypatch):
  monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
  monkeypatch.setattr(
    doctor.subprocess, "run", lambda *args, **options: SimpleNamespace(returncode=0, stdout=answer, stderr="")
  )
  cards = doctor.nvidia_cards()
  if isinstance(expected, int):
    assert len(cards) == expected and cards[0] == Card("Tesla T4", "550.54.15", 15360 << 20, 7.5)
  else:
    assert expected in cards


def test_an_nvidia_smi_that_hangs_is_said_to(monkeypatch):
  def hang(*args, **options):
    raise subprocess.TimeoutExpired("nvidia-smi", options["timeout"])

  monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
  monkeypatch.setattr(doctor.subprocess, "run", hang)
  assert "no answer in 15 s" in doctor.nvidia_cards()
  assert states(doctor.drivers(doctor.nvidia_cards()))["NVIDIA driver"] == "fail"


def test_packages_that_are_missing_or_too_old_are_failures_with_a_command(installed):
  installed.update({"optax": None, "flax": "0.1.0", "jax": "99.0"})
  found = {finding.name: finding for finding in doctor.versions()}
  assert found["optax"].state == "fail" and found["optax"].mend.startswith("pip install 'optax")
  assert found["flax"].state == "fail" and "0.1.0 does not fit" in found["flax"].finding
  assert found["jax"].state == "note" and "tests have passed up to" in found["jax"].finding
  assert found["jax and jaxlib"].state == "warn"


def test_a_cache_that_cannot_be_written_is_a_warning(monkeypatch, tmp_path):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file" / "cache"))
  finding = doctor.compile_cache()
  assert finding.state == "warn" and "PGOLF_CACHE" in finding.mend


def test_an_extension_that_is_missing_or_broken_is_a_warning(monkeypatch, tmp_path):
  assert doctor.extension().state == "ok"
  package = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
  monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: package)
  assert doctor.extension().state == "warn"
  (tmp_path / "ngram").mkdir()
  (tmp_path / "ngram" / "_ngram.abi3.so").write_bytes(b"no library")
  finding = doctor.extension()
  assert finding.state == "warn" and "a slower form" in finding.finding and "gcc" in finding.mend


def test_seconds_have_to_be_above_zero(capsys):
  assert main(["doctor", "--seconds", "0"]) == 1
  assert "--seconds 0 must be above 0" in capsys.readouterr().err

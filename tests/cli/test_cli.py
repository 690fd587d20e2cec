import errno
import re
import signal

import pytest

from pgolf_jax import stages
from pgolf_jax.cli import VERBS, commands, main
from pgolf_jax.errors import Stopped
from pgolf_jax.settings import Settings, builtin
from pgolf_jax.settings.fields import every_setting
from pgolf_jax.settings.reference import option


def test_every_verb_explains_itself_with_an_example(capsys):
  for verb in VERBS:
    for name in commands(verb):
      command = [verb, name] if name else [verb]
      assert main([*command, "--help"]) == 0, command
      assert "Example" in capsys.readouterr().out, command


@pytest.mark.parametrize(
  "args, status, part",
  [
    ([], 2, ""),
    (["rnu"], 2, "there is no verb rnu; did you mean run?"),
    (["data", "prepair"], 2, "did you mean prepare"),
    (["run"], 2, "pgolf run needs CONFIG, as in: pgolf run configs/demo.toml"),
    (["eval"], 2, "pgolf eval needs TARGET, run folder or artifact"),
    (["audit"], 2, "pgolf audit needs RUNS"),
    (["judge", "x"], 2, "pgolf judge needs --data"),
    (["eval", "x", "--docuemnts", "3"], 2, "did you mean --documents?"),
    (["eval", "x", "--documents", "three"], 2, "--documents three must be a whole number."),
    (["eval", "x", "--weights", "all"], 2, "--weights all must be one of artifact, averaged."),
    (["eval", "x", "--documents"], 2, "--documents needs a value."),
    (["data", "verify", "a", "b"], 2, "takes no b"),
    (["run", "--iterations", "5"], 2, "did you mean --train.iterations?"),
    (["run", "configs/demo.toml", "--train.iterations"], 2, "needs a value: a whole number, 0 or more"),
    (["run", "configs/demo.toml", "--train.iterations", "-5"], 1, "--train.iterations=-5 must be 0 or more."),
    (["run", "configs/demo.toml", "--train.min-lr=-3"], 1, "--train.min-lr=-3.0 must be from 0 to 1."),
    (["run", "configs/demo.toml", "--train.seq-schedule", "9@1,8@0.5"], 1, "goes backwards"),
    (["quantize", "x", "--quantize.embed_bits", "0"], 1, "--quantize.embed-bits=0 must be from 2 to 8."),
    (["run", "configs/demo.toml", "--ttt.enabled", "perhaps"], 2, "takes no perhaps"),
    (["run", "configs/dmo.toml"], 1, "did you mean configs/demo.toml"),
    (["run", "configs/demo.toml", "--out", ""], 2, "--out is empty."),
    (["package", "x", "--out="], 2, "--out is empty."),
    (["audit", ""], 2, "RUNS is empty."),
    (["eval", "x", "--no-ttt", "--out", "y"], 1, "--out keeps the scores of test-time training"),
    (["data", "inspect", "nowhere"], 1, "nowhere"),
    (["judge", "x", "--data", "y", "--cuts", "0"], 1, "--cuts 0: at least one cut"),
    (["audit", "x", "--cuts", "-1"], 1, "--cuts -1: at least one cut"),
  ],
)
def test_errors_are_one_sentence_without_a_traceback(args, status, part, capsys):
  assert main(args) == status
  error = capsys.readouterr().err
  assert part in error and "Traceback" not in error


@pytest.mark.parametrize("signum, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_by_a_signal_has_the_exit_status_of_the_signal(signum, status, monkeypatch, capsys):
  def stop(*_):
    raise Stopped(signum, "step 7")

  monkeypatch.setattr(stages, "run", stop)
  assert main(["run", "configs/demo.toml"]) == status
  assert f"stopped by {signum.name} after step 7" in capsys.readouterr().err


@pytest.mark.parametrize(
  "error",
  [
    OSError(errno.ENOSPC, "No space left on device", "runs/demo/artifact.pgolf"),
    OSError(errno.EFBIG, "File too large"),
    ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device"),
  ],
)
def test_a_full_disk_is_one_sentence_whoever_reports_it(error, monkeypatch, capsys):
  def stop(*_):
    try:
      raise error
    except Exception as cause:
      raise RuntimeError("a checkpoint could not be written") from cause

  monkeypatch.setattr(stages, "run", stop)
  assert main(["run", "configs/demo.toml"]) == 1
  said = capsys.readouterr().err
  assert said.startswith("pgolf: no room on the disk") and said.count("\n") == 1 and "same command continues" in said


def test_an_environment_variable_that_looks_like_a_setting_is_refused(monkeypatch, capsys):
  monkeypatch.setenv("TTT_LORA_RNK", "80")
  assert main(["run", "configs/demo.toml"]) == 1
  assert "did you mean TTT_LORA_RANK" in capsys.readouterr().err


def test_impossible_settings_are_refused_before_anything_starts(tmp_path, capsys):
  assert main(["run", "configs/demo.toml", "--out", str(tmp_path / "run"), "--model.num-heads", "3"]) == 1
  assert "must divide model.model_dim" in capsys.readouterr().err
  assert not (tmp_path / "run").exists()


def test_the_command_line_is_over_the_environment_over_the_file(monkeypatch):
  started = []
  monkeypatch.setattr(stages, "run", lambda *arguments: started.append(arguments))
  monkeypatch.setenv("ITERATIONS", "7")
  monkeypatch.setenv("SEED", "8")
  assert main(["run", "configs/demo.toml", "--seed", "9", "--train.seq-schedule", "64@0.5,128@1"]) == 0
  [(settings, folder, names)] = started
  assert (settings.train.iterations, settings.seed, settings.model.num_layers) == (7, 9, 5)
  assert settings.train.seq_schedule == ((64, 0.5), (128, 1.0))
  assert (folder.name, names) == ("demo", list(stages.STAGES))


def test_a_config_of_an_editor_that_marks_utf8_is_read(monkeypatch, tmp_path):
  started = []
  monkeypatch.setattr(stages, "run", lambda *arguments: started.append(arguments))
  (tmp_path / "marked.toml").write_text("seed = 7", encoding="utf-8-sig")
  assert main(["run", str(tmp_path / "marked.toml")]) == 0 and started[0][0].seed == 7


def test_options_may_come_in_any_order(monkeypatch):
  started = []
  monkeypatch.setattr(stages, "run", lambda *arguments: started.append(arguments))
  orders = [
    ["configs/demo.toml", "--seed", "9", "--out", "x", "--ttt.no-enabled", "--train.min-lr", "0.5"],
    ["--seed=9", "--ttt.enabled", "false", "--train.min_lr", "0.5", "--out", "x", "configs/demo.toml"],
    ["--out", "x", "--ttt.enabled=0", "configs/demo.toml", "--train.min-lr=5e-1", "--seed", "9"],
  ]
  for words in orders:
    assert main(["run", *words]) == 0
  assert started[0] == started[1] == started[2]
  settings, folder, _ = started[0]
  assert (settings.seed, settings.ttt.enabled, settings.train.min_lr, folder.name) == (9, False, 0.5, "x")


def test_a_truth_before_the_config_takes_no_word_that_is_none(monkeypatch):
  started = []
  monkeypatch.setattr(stages, "run", lambda *arguments: started.append(arguments))
  assert main(["run", "--ttt.enabled", "configs/demo.toml"]) == 0
  assert started[0][0].ttt.enabled and started[0][1].name == "demo"


def test_help_fits_two_screens_and_shows_a_configs_values(capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "80")
  assert main(["run", "--help"]) == 0
  text = capsys.readouterr().out
  assert text.count("\n") <= 66 and max(map(len, text.splitlines())) <= 100
  assert "--train.iterations N" in text and "(ITERATIONS; 20000)" in text and "--help-all" in text
  assert main(["run", "--help", "configs/demo.toml"]) == 0
  assert "(ITERATIONS; 100000)" in capsys.readouterr().out
  for words in (["--out", "runs/x", "--help"], ["--out", "runs/x", "configs/demo.toml", "-h"], ["--seed", "x", "-h"]):
    assert main(["run", *words]) == 0
    assert f"(ITERATIONS; {100000 if 'configs/demo.toml' in words else 20000})" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["run", "--help-all"], ["help", "settings"]])
def test_every_setting_is_shown_on_request_with_its_sentence_and_its_environment_name(words, capsys):
  assert main(words) == 0
  text = re.sub(r"\s+", " ", capsys.readouterr().out)
  for entry in every_setting(Settings):
    assert re.search(rf"{option(entry)} .{{0,60}}{re.escape(entry.meaning)} \({entry.env or ''}", text), entry.name


def test_no_help_has_words_of_python(capsys):
  for verb in VERBS:
    for name in commands(verb):
      assert main([verb, name, "--help"] if name else [verb, "--help"]) == 0
      text = capsys.readouterr().out
      assert not re.search(r"None|True|False|PosixPath|<class|NoneType|[\[(]'", text), text


def test_a_config_that_comes_with_the_program_is_found_by_name_from_anywhere(tmp_path, monkeypatch, capsys):
  started = []
  monkeypatch.setattr(stages, "run", lambda *arguments: started.append(arguments))
  monkeypatch.chdir(tmp_path)
  assert main(["run", "demo", "--seed", "5"]) == 0
  [(settings, folder, _)] = started
  assert settings.seed == 5 and settings.model.vocab_size == 1024 and str(folder) == "runs/demo"
  assert main(["run", "record_8xh10"]) == 1
  assert "did you mean record_8xh100?" in capsys.readouterr().err
  (tmp_path / "demo").write_text("seed = 9\n")  # a path works as before, and a file that is there comes first
  assert main(["run", "demo"]) == 0
  assert started[-1][0].seed == 9


def test_the_configs_are_listed_and_shown(capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "80")
  assert main(["configs"]) == 0
  said = capsys.readouterr().out
  assert "record_8xh100: " in said and "8 × H100" in said and max(map(len, said.splitlines())) <= 80
  assert main(["configs", "--name", "demo"]) == 0
  assert capsys.readouterr().out == builtin.find("demo").read_text()

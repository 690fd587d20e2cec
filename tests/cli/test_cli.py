import errno
import re
import signal

import pytest

from pgolf_jax import stages
from pgolf_jax.cli import VERBS, commands, main
from pgolf_jax.errors import Stopped
from pgolf_jax.settings import builtin


def test_every_verb_explains_itself_with_an_example(capsys):
  for verb in VERBS:
    for name in commands(verb):
      command = [verb, name] if name else [verb]
      try:
        status = main([*command, "--help"])
      except SystemExit as exit:
        status = exit.code
      assert not status, command
      assert "Example" in capsys.readouterr().out, command


@pytest.mark.parametrize(
  "args, status, part",
  [
    ([], 2, ""),
    (["rnu"], 2, "did you mean run"),
    (["data", "prepair"], 2, "did you mean prepare"),
    (["run"], 1, "needs a path first"),
    (["run", "configs/dmo.toml"], 1, "did you mean configs/demo.toml"),
    (["data", "inspect", "nowhere"], 1, "nowhere"),
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


def test_every_setting_has_a_sentence_of_its_own(capsys):
  with pytest.raises(SystemExit):
    main(["run", "--help"])
  text = capsys.readouterr().out
  option = r"--(?:[a-z_-]+\.)+[a-z0-9-]+(?:, --\S+)?(?: (?:INT|FLOAT|STR|\{\S+\}\S*|\S+…))? (.*?)\(default:"
  sentences = [sentence.strip() for sentence in re.findall(option, re.sub(r"[│\s]+", " ", text))]
  assert len(sentences) > 150 and "" not in sentences
  common = {sentence for sentence in sentences if sentences.count(sentence) > 2}
  assert common <= {"learning rate", "weight decay", "largest norm of a gradient; 0: no limit", "its weight decay"}


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

"""Sets of runs: seeds, sweeps, what they come to, and the table of runs."""

import json
import shutil

import pytest
import tomli_w
from tensorboardX.proto.event_pb2 import Event
from tiny_model import SETTINGS, write_data

from pgolf_jax import report, run_set, run_table, stages
from pgolf_jax.cli import main
from pgolf_jax.errors import Stopped, UserError
from pgolf_jax.run_folder import RunFolder, read_metrics
from pgolf_jax.run_set import members
from pgolf_jax.settings.load import changed, from_toml, to_dict

QUICK = {"train.iterations": 3, "train.max_wallclock_seconds": 0.0, "train.warmup_steps": 0, "model.num_loops": 0}
QUICK |= {"model.model_dim": 32, "optimizer.muon_dtype": "float32", "train.val_loss_every": 2}


@pytest.fixture
def config(tmp_path):
  write_data(tmp_path / "data")
  settings = changed(SETTINGS, QUICK | {"data.path": str(tmp_path / "data")})
  path = tmp_path / "tiny.toml"
  path.write_text(tomli_w.dumps(to_dict(settings)))
  return path


def tags(folder) -> dict[str, dict[int, float]]:
  """Curve's name → step → value of a folder of TensorBoard's event files."""
  found = {}
  for path in sorted(folder.iterdir()):
    data = path.read_bytes()
    while data:
      length = int.from_bytes(data[:8], "little")  # then 4 bytes of checksum, the event, 4 more
      event = Event.FromString(data[12 : 12 + length])
      for value in event.summary.value:
        found.setdefault(value.tag, {})[event.step] = value.simple_value
      data = data[16 + length :]
  return found


def test_a_set_keeps_what_succeeds_and_goes_on_where_it_failed(config, tmp_path, capsys):
  out = tmp_path / "set"
  command = ["train", str(config), "--out", str(out), "--seeds", "1,2", "--set", "matrix_lr=0.02,0.05"]
  other = RunFolder(out / "matrix_lr=0.02_seed=2", changed(from_toml(config), {"train.iterations": 9}))
  (other.path / "results.json").write_text("{}")
  assert main(command) == 1
  said = capsys.readouterr().out
  assert "\\n" not in said  # the table begins on a line of its own
  assert "matrix_lr=0.02_seed=2 failed:" in said and "was made with other settings" in said
  found = json.loads((out / "set.json").read_text())
  assert list(found["failed"]) == ["matrix_lr=0.02_seed=2"]

  shutil.rmtree(out / "matrix_lr=0.02_seed=2")
  trained = {path: path.stat().st_mtime_ns for path in out.glob("*/metrics.jsonl")}
  assert len(trained) == 3 and main(command) == 0
  assert all(path.stat().st_mtime_ns == time for path, time in trained.items())
  found = json.loads((out / "set.json").read_text())
  assert found["failed"] == {} and len(found["runs"]) == 4
  groups = {group["settings"]["optimizer.matrix_lr"]: group for group in found["configurations"]}
  for lr in (0.02, 0.05):
    folders = [RunFolder(out / f"matrix_lr={lr}_seed={seed}") for seed in (1, 2)]
    assert [run.settings.optimizer.matrix_lr for run in folders] == [lr, lr]
    bpb = [run.results()["plain"]["bpb"] for run in folders]
    score = groups[lr]["scores"]["averaged"]
    assert score["n"] == 2 and score["best"] == min(bpb) and bpb[0] != bpb[1]
    assert score["mean"] == pytest.approx(sum(bpb) / 2) and score["deviation"] == pytest.approx(
      abs(bpb[0] - bpb[1]) / 2**0.5
    )
  gaps = [
    b - a
    for a, b in (
      [RunFolder(out / f"matrix_lr={lr}_seed={seed}").results()["plain"]["bpb"] for lr in (0.02, 0.05)]
      for seed in (1, 2)
    )
  ]
  gap = groups[0.05]["differences"]["averaged"]
  assert groups[0.02]["differences"] == {} and gap["count"] == 2
  assert gap["mean"] == pytest.approx(sum(gaps) / 2) and gap["error"] == pytest.approx(abs(gaps[0] - gaps[1]) / 2)
  said = capsys.readouterr().out
  assert f"{gap['mean']:+.5f} ± {gap['error']:.5f}" in said
  assert "matrix_lr=0.02_seed=1" in said and "±" in said and max(map(len, said.splitlines()[-8:])) <= 110

  run = RunFolder(out / "matrix_lr=0.05_seed=2")
  curves, lines = tags(run.tensorboard), read_metrics(run.metrics)
  assert curves["lr/matrix"][1] == pytest.approx(0.05 * lines[0]["lr_scale"])
  assert curves["lr/scalar"][3] == pytest.approx(0.02 * lines[2]["lr_scale"]) and lines[2]["lr_scale"] < 1
  assert list(curves["bpb/validation"]) == [2] and lines[1]["val_bpb"] == pytest.approx(curves["bpb/validation"][2])
  assert curves["bpb/averaged"] == {3: pytest.approx(run.results()["plain"]["bpb"])}
  assert set(curves["tokens_per_second"]) == {1, 2, 3} and curves["peak_memory_gib"][3] > 0.01
  text = run.log.read_text()
  assert "train: begins, from config " in text and "shards " in text and "python 3." in text
  assert f"plain: complete after {run.results()['plain']['stage_seconds']:.1f} s" in text
  assert f"{run.results()['plain']['bpb']:.5f} bits per byte" in text

  # The same runs as a table.
  (out / "broken").mkdir()
  (out / "broken" / "config.toml").write_text("seed = ")
  assert main(["runs", str(tmp_path), "--sort", "averaged", "--json", "--filter", "matrix_lr=0.05"]) == 0
  captured = capsys.readouterr()
  rows = json.loads(captured.out)
  assert [row["settings"]["optimizer.matrix_lr"] for row in rows] == [0.05, 0.05]
  assert rows[0]["averaged"] <= rows[1]["averaged"] and {row["steps"] for row in rows} == {3}
  assert "not readable: set/broken: " in captured.err and rows[0]["verdict"] == "not audited"
  found, _ = run_table.find(tmp_path)
  for width in (40, 80, 200):
    lines = run_table.text(run_table.chosen(found, "", "name"), width).splitlines()
    assert max(map(len, lines)) <= width and sum("seed=" in line for line in lines) == 4


def test_the_first_configuration_is_the_first_given(tmp_path):
  """In a set's figures and in its report, also where names sort otherwise and more runs come later."""
  folder, bpb = tmp_path / "set", {}

  def one(settings, path):
    score = {"bpb": bpb.setdefault(path.name, 2.0 - 0.1 * len(bpb)), "loss": 1.0, "targets": 1, "bytes": 1}
    RunFolder(path, settings).finish("plain", {**score, "seconds": 1.0, "stage_seconds": 1.0}, {})
    return 0

  for grid in ("train.iterations=500,1000", "train.iterations=50"):
    run_set.run(folder, members(SETTINGS, "2,1", [grid]), one)
    found = json.loads((folder / "set.json").read_text())
    steps = [group["settings"]["train.iterations"] for group in found["configurations"]]
    assert steps == ([500, 1000] if len(bpb) == 4 else [50, 500, 1000])
    assert [bool(group["differences"]) for group in found["configurations"]] == [False, True, True][: len(steps)]
    assert found["runs"][0]["seed"] == 2
    assert [path.name for path in report.set_members(folder)] == [row["run"] for row in found["runs"]]
  assert found["configurations"][1]["differences"]["averaged"]["mean"] == pytest.approx(0.4)
  (folder / "set.json").unlink()
  assert report.set_members(folder) == sorted(folder.iterdir())


def test_values_are_those_of_settings():
  made = members(SETTINGS, "1,2", ["EMBED_LR=0.1", "train.seq_schedule=16@0.5,32@1;32@1", "min_lr=0,0.5"][1:])
  assert len(made) == 8 and [member.settings.seed for member in made[:2]] == [1, 2]
  assert made[0].settings.train.seq_schedule == ((16, 0.5), (32, 1.0)) and made[0].settings.train.min_lr == 0.0
  assert len({member.name for member in made}) == 8 and not any(set("/,; ") & set(member.name) for member in made)
  assert members(SETTINGS, "", ["MATRIX_LR=0.1"])[0].settings.optimizer.matrix_lr == 0.1


@pytest.mark.parametrize(
  "seeds, grid, part",
  [
    ("1,x", [], "must be a whole number"),
    ("1,1", [], "a value twice"),
    ("", ["matrix_lr"], "must read name=a,b,c"),
    ("", ["matrx_lr=1"], "did you mean"),
    ("", ["min_lr=0,"], "an empty value"),
    ("", ["matrix_lr=1", "optimizer.matrix_lr=2"], "is given twice"),
    ("", ["rank=1,2"], "could be ttt.lora.rank or ttt.short.rank"),
    ("", ["num_heads=4,3"], "must divide model.model_dim"),
    ("1", ["seed=2"], "give one of them"),
  ],
)
def test_a_sweep_over_what_is_no_setting_is_refused(seeds, grid, part):
  with pytest.raises(UserError, match=part):
    members(SETTINGS, seeds, grid)


def test_a_signal_ends_the_set_and_a_run_is_no_set(tmp_path):
  def one(settings, folder):
    raise Stopped(15, "step 7")

  with pytest.raises(Stopped):
    run_set.run(tmp_path / "set", members(SETTINGS, "1,2"), one)
  RunFolder(tmp_path / "run", SETTINGS)
  with pytest.raises(UserError, match="is the folder of one run"):
    run_set.run(tmp_path / "run", members(SETTINGS, "1,2"), one)


def test_a_run_among_others_is_refused(tmp_path, capsys):
  RunFolder(tmp_path / "runs/first", SETTINGS)
  with pytest.raises(UserError, match="holds other runs, such as first; give this one another with --out"):
    stages.run(SETTINGS, tmp_path / "runs", ["train"])
  assert main(["runs", str(tmp_path / "runs")]) == 0 and "first" in capsys.readouterr().out


def test_wandb_is_asked_for_by_name_alone(monkeypatch, tmp_path):
  given = []
  monkeypatch.setattr(stages, "run", lambda *_, tracking=None: given.append(tracking) or 0)
  assert main(["run", "configs/demo.toml"]) == 0
  assert main(["run", "configs/demo.toml", "--wandb", "golf"]) == 0
  assert main(["train", "configs/demo.toml", "--wandb", "golf", "--seeds", "1,2", "--out", str(tmp_path / "s")]) == 0
  assert given == [None, stages.Tracking("golf"), *[stages.Tracking("golf", "s")] * 2]


def test_a_folder_without_runs_says_so(tmp_path, capsys):
  assert main(["runs", str(tmp_path)]) == 0
  assert "There are no runs under" in capsys.readouterr().out
  assert main(["runs", str(tmp_path / "nowhere")]) == 1


def test_columns_go_before_rows_are_folded():
  row = dict.fromkeys(run_table.COLUMNS)
  rows = [row | {"name": "a long name of a run", "ttt": 1.25, "seed": 42}, row | {"name": "b", "steps": 8, "seed": 0}]
  assert run_table.text(rows, 80).splitlines()[1] == "a long name of a run    42         1.25000"
  narrow = run_table.text(rows, 36).splitlines()
  assert narrow[1] == "a long name of a run         1.25000" and narrow[-1] == "not shown, for want of room: seed"
  assert run_table.text(rows, 20).splitlines()[:3] == ["a long name of a run", "  seed: 42", "  ttt: 1.25000"]

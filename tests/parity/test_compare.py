"""Two runs side by side: what a log tells, where losses part, paired scores, and sentences for what is no run."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf_jax.cli import main
from pgolf_jax.parity import compare
from pgolf_jax.parity.compare import Side, curves, documents, mean_of_series, setting_differences
from pgolf_jax.parity.compare_page import verdict
from pgolf_jax.parity.torch_log import ARTIFACT, AVERAGED, RAW, TTT, RunRecord, Scored, Stage, parse
from pgolf_jax.report.statistics import ratio
from pgolf_jax.run_folder import RunFolder
from pgolf_jax.settings import Settings

SETTINGS = """\
W0101 10:00:00.000000 77 torch/distributed/run.py:803] Setting OMP_NUM_THREADS environment variable
Hyperparameters:
  datasets_dir: /somewhere/else
  iterations: 400
  matrix_lr: 0.026
  midrun_cap_schedule:
  qk_gain_init: 5.0
  rank: 0
  seed: 7
  sparse_attn_gate_enabled: True
  train_batch_tokens: 1000
  train_seq_schedule: 1024@0.100,2048@0.700,3072@1.000
  ttt_q_lora: False
  ttt_short_lora_rank: 80
  within_boost: 0.75
train_shards: 2
model_params:123456
growth_stage_rewarmup:start step:593 steps:32 seq_len:2048
"""

RECORD = f"""\
{SETTINGS}
====================================================================================================
            log(f"{{step}}/{{h.iterations}} train_loss: {{train_loss.item():.4f}}")
1/400 train_loss: 9.0000 train_time: 0.0m tok/s: 2000
2/400 train_loss: 8.5000 train_time: 0.0m tok/s: 1000
growth_stage:seq_len:2048 progress:0.100 step:2
100/400 train_loss: 3.2500 train_time: 1.7m tok/s: 1000
200/400 val_loss: 3.1000 val_bpb: 1.2000
stopping_early: wallclock_cap train_time: 199500ms step: 200/400
peak memory allocated: 3000 MiB reserved: 4000 MiB
diagnostic pre-quantization post-ema val_loss:3.05000000 val_bpb:1.19000000 eval_time:1500ms
Code size (uncompressed): 99999 bytes
Code size (compressed): 4000 bytes
Serialized model: 555 bytes
Serialized model quantized+pergroup: 70000 bytes
Total submission size quantized+pergroup: 74000 bytes
diagnostic quantized val_loss:3.07000000 val_bpb:1.20500000 eval_time:1600ms
ttp: b3/3 bl:3.0000 bb:1.1500 rl:3.0000 rb:1.1500 dl:900-950 gd:0 sr:0 sf:0 tr:24/24 wt:0
ttp: b1/3 bl:3.2000 bb:1.2500 rl:3.1000 rb:1.2000 dl:30-50 gd:1 sr:0 sf:1 tr:24/24 wt:0
quantized_ttt_phased val_loss:3.01000000 val_bpb:1.17000000 eval_time:50000ms
total_eval_time:50.1s
[rank3]: Traceback (most recent call last):
"""

FIRST = """\
model_params:17059912
world_size:8 grad_accum_steps:1
train_batch_tokens:524288 train_seq_len:1024 iterations:20000 warmup_steps:20 max_wallclock_seconds:600.000
seed:1337
step:0/20000 val_loss:6.9000 val_bpb:4.1000 train_time:0ms step_avg:0.02ms
step:1/20000 train_loss:6.9000 train_time:50ms step_avg:50.00ms
step:1000/20000 train_loss:2.4000 train_time:43000ms step_avg:43.00ms
step:1000/20000 val_loss:2.3900 val_bpb:1.4000 train_time:43000ms step_avg:43.00ms
Code size: 47000 bytes
Serialized model int8+zlib: 15800000 bytes (payload:1 raw_torch:2 payload_ratio:3.00x)
Total submission size int8+zlib: 15847000 bytes
final_int8_zlib_roundtrip val_loss:2.4100 val_bpb:1.4100 eval_time:1400ms
final_int8_zlib_roundtrip_exact val_loss:2.41001234 val_bpb:1.41004321
"""


def test_the_record_scripts_log_is_read():
  log = parse(RECORD)
  assert log.told["matrix_lr"] == "0.026" and log.told["midrun_cap_schedule"] == "" and "step" not in log.told
  assert log.losses == {1: 9.0, 2: 8.5, 100: 3.25}
  assert log.seconds == {1: 0.5, 2: 2.0, 100: 100.0, 200: 199.5}
  assert log.stages == {
    RAW: Stage(1.2, 3.1),
    AVERAGED: Stage(1.19, 3.05, 1.5),
    ARTIFACT: Stage(1.205, 3.07, 1.6),
    TTT: Stage(1.17, 3.01, 50),
  }
  assert list(log.stages) == [RAW, AVERAGED, ARTIFACT, TTT]
  assert log.figures == {
    "parameters": 123456, "steps": 200, "tokens_per_second": 1000, "train_seconds": 199.5, "peak_memory_mib": 3000,
    "code_bytes": 4000, "artifact_bytes": 70000, "total_bytes": 74000, "evaluation_seconds": 50.1,
  }  # fmt: skip
  assert log.scored == {("batch", 3, 3, 900, 950): Scored(1.15), ("batch", 1, 3, 30, 50): Scored(1.25)}


def test_the_first_scripts_log_is_read():
  log = parse(FIRST)
  assert log.told["train_batch_tokens"] == "524288" and log.told["seed"] == "1337"
  assert log.losses == {1: 6.9, 1000: 2.4} and log.seconds == {1: 0.05, 1000: 43.0}
  assert log.stages == {RAW: Stage(1.4, 2.39), ARTIFACT: Stage(1.41004321, 2.41001234, 1.4)}
  assert (log.figures["artifact_bytes"], log.figures["code_bytes"]) == (15_800_000, 47_000)


def test_of_two_trainings_in_one_log_the_last_counts():
  again = RECORD.replace("100/400 train_loss: 3.2500", "100/400 train_loss: 3.3000").replace("2/400", "3/400")
  assert parse(RECORD + again).losses == {1: 9.0, 3: 8.5, 100: 3.3}


@settings(max_examples=30, deadline=None)
@given(
  st.lists(st.one_of(st.text(), st.sampled_from(RECORD.splitlines()), st.binary().map(repr)), max_size=20), st.randoms()
)
def test_any_text_is_read_without_an_error(lines, random):
  def mutated(line):
    at = random.randrange(len(line) + 1)
    return line[:at] + random.choice(["9" * 500, "nan", "-", "\x00", ".", "e999", ""]) + line[at:]

  log = parse("\n".join(map(mutated, lines)))
  assert all(isinstance(loss, float) for loss in log.losses.values())


def side(record=None, settings=None):
  return Side("run", "log", record or RunRecord(), settings)


def test_settings_of_a_log_and_of_a_run_are_compared_by_meaning():
  ours = dataclasses.replace(Settings(), seed=7)
  differing, common = setting_differences(side(settings=ours), side(parse(RECORD)))
  assert differing == [
    ("model.qk_gain_init", "5.25", "5.0"),
    ("train.iterations", "20000", "400"),
    ("train.batch_tokens", "786432", "1000"),
    ("within_boost", "0", "0.75"),
  ]
  assert common == 11
  assert (
    setting_differences(side(settings=ours), side(settings=ours)) == ([], common_settings := 160) or common_settings
  )


def test_two_logs_are_compared_in_every_setting_that_both_tell():
  other = RECORD.replace("within_boost: 0.75", "within_boost: 0").replace("matrix_lr: 0.026", "matrix_lr: 2.6e-2")
  assert setting_differences(side(parse(RECORD)), side(parse(other)))[0] == [("within_boost", "0.75", "0")]


def run_of(losses, resolution=1e-7):
  return RunRecord(losses=dict(enumerate(map(float, losses), 1)), resolution=resolution)


def noisy(seed, steps=300, size=0.02):
  """Losses of a run: a curve and the batches' own noise, which all runs share, and noise that is the run's."""
  curve = 2.3 + 4 * np.exp(-np.arange(steps) / steps * 8) + 0.1 * np.random.default_rng(99).standard_normal(steps)
  return curve + size * np.random.default_rng(seed).standard_normal(steps)


def test_equal_runs_do_not_part():
  found = curves(run_of(noisy(0)), run_of(noisy(0)))
  assert found.first_difference is None and found.parted is None and not found.difference.any()


def test_runs_that_differ_by_noise_part_in_fewer_than_one_case_of_a_hundred():
  parted = [curves(run_of(noisy(i, 120)), run_of(noisy(1000 + i, 120))).parted for i in range(200)]
  assert sum(step is not None for step in parted) <= 3


def test_a_small_shift_is_found_where_it_begins():
  shifted = noisy(1)
  shifted[150:] += 0.08
  found = curves(run_of(noisy(0)), run_of(shifted))
  assert 150 < found.parted <= 170
  assert found.first_difference == 1


def test_losses_that_drift_apart_part_once_the_drift_exceeds_rounding():
  a = noisy(0)
  b = a + 1e-9 * 1.1 ** np.arange(300) * np.random.default_rng(3).choice([-1, 1], 300)
  found = curves(run_of(a), run_of(b))
  assert 30 < found.first_difference < 80  # where it exceeds 2e-7


def test_what_a_noise_run_differs_by_is_no_difference():
  walk = lambda seed: np.cumsum(np.random.default_rng(seed).standard_normal(300)) * 0.01  # noqa: E731
  a, b, noise = (run_of(noisy(i) + walk(10 + i)) for i in range(3))
  assert curves(a, b).parted is not None
  assert curves(a, b, noise).parted is None
  with pytest.raises(compare.UserError, match="it needs 8"):
    curves(a, b, run_of([1, 2, 3]))


def test_what_is_printed_with_few_digits_is_known_to_half_of_the_last():
  a = np.round(np.linspace(4, 2, 100), 4)
  found = curves(run_of(a, 5e-5), run_of(a + 9e-5, 5e-5))
  assert found.first_difference is None and found.parted is None
  assert curves(run_of(a, 5e-5), run_of(a + 3e-4, 5e-5)).parted == 1
  assert curves(run_of(a[:5]), run_of(a[:5] + 1)).floor is None
  assert curves(run_of([1.0, np.nan]), run_of([1.0, 2.0])).step.tolist() == [1]
  assert curves(run_of([]), run_of([1.0])) is None


def test_neighbours_of_a_series_are_not_taken_for_independent():
  x = np.random.default_rng(0).standard_normal(30) + 0.3
  slow = np.repeat(x, 50)
  assert mean_of_series(slow).value == pytest.approx(x.mean())
  assert mean_of_series(slow).error > 4 * ratio(slow).error
  assert mean_of_series(x) == ratio(x)


def test_documents_are_paired_by_place_and_bytes():
  rng = np.random.default_rng(0)
  sizes, bpb = rng.integers(100, 10_000, 50), 1 + 0.1 * rng.random(50)
  gain = 0.01 + 0.005 * rng.standard_normal(50)
  a, b = (
    RunRecord(
      scored={("document", i, int(n)): Scored(float(x), int(n)) for i, (n, x) in enumerate(zip(sizes, y, strict=True))}
    )
    for y in (bpb, bpb - gain)
  )
  found = documents(a, b)
  assert found.each.value == pytest.approx(-gain.mean()) and found.better == int((gain > 0).sum())
  assert found.by_bytes.value == pytest.approx(-np.average(gain, weights=sizes))
  # The error of a ratio of sums, by resampling the documents.
  picks = rng.integers(0, 50, (4000, 50))
  resampled = (-gain[picks] * sizes[picks]).sum(1) / sizes[picks].sum(1)
  assert found.by_bytes.error == pytest.approx(resampled.std(), rel=0.15)
  other = RunRecord(scored={("document", i, int(n) + 1): Scored(1.0, int(n) + 1) for i, n in enumerate(sizes)})
  assert documents(a, other) is None


@pytest.mark.parametrize(
  ("steps", "all_of_them", "last"),
  [(20, "n = 20,", "n = 5,"), (80, "n = 20 blocks,", "n = 20,"), (160, *["n = 20 blocks,"] * 2)],
)
def test_blocks_are_named_where_a_series_was_cut_into_them(steps, all_of_them, last):
  loss = np.random.default_rng(0).standard_normal((2, steps))
  said = verdict(compare.compare(*(side(run_of(x)) for x in loss)))
  means = [sentence for sentence in said if sentence.startswith("Mean difference of the loss")]
  assert [f"({part}" in sentence for part, sentence in zip((all_of_them, last), means, strict=True)] == [True, True]


@pytest.fixture
def run(tmp_path):
  """A run folder with everything that is compared."""
  run = RunFolder(tmp_path / "jax", Settings())
  run.metrics.write_text(
    "".join(json.dumps({"step": s, "loss": 9 - s / 30, "seconds": s}) + "\n" for s in range(1, 201))
  )
  run.scores.mkdir()
  lines = [{"document": i, "bytes": 100 + i, "nats": 80.0 + i} for i in range(5)]
  (run.scores / "documents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  run.finish("train", {"steps": 200, "seconds": 200.0, "tokens_per_second": 5.0, "parameters": 9}, {})
  run.finish("plain", {"bpb": 1.18, "loss": 3.0, "seconds": 2.0}, {})
  run.finish("ttt", {"bpb": 1.16, "loss": 2.9, "seconds": 9.0, "bpb_without_hints": 1.165}, {})
  return run


def test_a_run_folder_beside_a_log(run, tmp_path, capsys):
  pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
  (tmp_path / "torch.log").write_text(RECORD)
  assert main(["parity", "compare", str(run.path), str(tmp_path / "torch.log"), "--out", str(tmp_path / "out")]) == 0
  text = capsys.readouterr().out
  lines = [" ".join(line.split()) for line in text.splitlines()]
  assert "averaged weights 1.18000 1.19000 +0.01000" in lines and "test-time training 1.16000 1.17000 +0.01000" in lines
  assert "2 8.9333 8.5000 -4.33e-01 2.0 2.0" in lines and "time per step, ms 1,000.0 995.0 0.995" in lines
  assert "model.qk_gain_init 5.25 5.0" in lines and "3 common steps are too few" in text
  written = json.loads((tmp_path / "out" / "compare.json").read_text())
  assert written["losses"]["step"] == [1, 2, 100] and written["a"]["stages"][TTT]["bpb"] == 1.16
  assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
  assert (tmp_path / "out" / "compare.txt").read_text().strip() == text.rsplit("\n", 2)[0].strip()


def test_two_run_folders_and_a_noise_run(run, tmp_path, capsys):
  folders = [str(run.path)] * 2
  assert main(["parity", "compare", *folders, "--noise", str(run.metrics), "--json"]) == 0
  found = json.loads(capsys.readouterr().out)
  assert found["losses"]["parted"] is None and found["settings"] == {}
  assert found["documents"]["each"] == {"value": 0.0, "error": 0.0, "p": 1.0, "count": 5}
  assert main(["parity", "compare", *folders]) == 0
  text = capsys.readouterr().out
  assert "equal at all 200 common steps" in text and "All 160 settings" in text.replace(
    str(found["settings_in_common"]), "160"
  )


def test_without_matplotlib_there_is_a_table_and_a_sentence(run, tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
  assert main(["parity", "compare", str(run.path), str(run.path), "--out", str(tmp_path / "out")]) == 0
  assert "pip install 'pgolf_jax[report]'" in capsys.readouterr().out
  assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["compare.json", "compare.txt"]


@pytest.mark.parametrize(
  ("name", "data", "message"),
  [
    ("a.log", b"", "no log of a PyTorch script"),
    ("a.log", bytes(range(256)) * 50, "no log of a PyTorch script"),
    ("run.log", b"2026-01-01T00:00:00Z step 1 | loss 6.9 | lr", "of a run made here give the folder"),
    ("a.jsonl", b'{"step": 1, "loss": 3.0}\n{"step"', None),
    ("a.jsonl", b'{"step": 1}\n', "no line has step and loss"),
    ("a.jsonl", b'{"step": 1, "loss": 1e999}\n', "damaged JSON"),
    ("a.jsonl", b"[" * 100_000, "is no metrics.jsonl"),
    ("a.jsonl", b"[3]\n", "a JSON array where object is needed"),
    ("eval.log", b"quantized_ttt_phased val_loss:2.3 val_bpb:1.05 eval_time:5ms\n", "neither a step nor the score"),
    (None, None, "no file or folder"),
  ],
)
def test_what_is_no_run_is_one_sentence(run, tmp_path, name, data, message, capsys):
  path = tmp_path / (name or "none")
  if data is not None:
    path.write_bytes(data)
  (tmp_path / "good.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
  status = main(["parity", "compare", str(path), str(tmp_path / "good.jsonl")])
  said = capsys.readouterr().err
  if message is None:
    assert status == 0 and said == ""
  else:
    assert status == 1 and message in said and said.count("\n") == 1 and "Traceback" not in said

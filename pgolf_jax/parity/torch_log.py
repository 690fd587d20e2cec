"""The log that the PyTorch scripts of the challenge print: settings, losses, scores by stage, times, sizes.

Two dialects are read, line by line, whatever else stands between: that of the record's script and that of the
challenge's first one, from which most others descend. As in

    Hyperparameters:
      matrix_lr: 0.026
    500/20000 train_loss: 2.6146 train_time: 0.9m tok/s: 7700066
    step:500/20000 train_loss:2.6146 train_time:54000ms step_avg:108.00ms
    diagnostic quantized val_loss:2.34211201 val_bpb:1.07025102 eval_time:18952ms
    ttp: b2079/2084 bl:2.2483 bb:1.0826 rl:2.2483 rb:1.0826 dl:13679-14936 gd:0 sr:0 sf:0 tr:24/24 wt:0
    quantized_ttt_phased val_loss:2.31614048 val_bpb:1.05838308 eval_time:553458ms
"""

import dataclasses
import re
from typing import NamedTuple

from pgolf_jax.settings.load import FIXED, env_names

RAW, AVERAGED, ARTIFACT, TTT = "raw weights", "averaged weights", "artifact", "test-time training"
"""The stages that every run has, in order."""


class Stage(NamedTuple):
  """The score of one stage."""

  bpb: float  # bits per byte
  loss: float | None = None  # nats per token
  seconds: float | None = None  # of the evaluation


class Scored(NamedTuple):
  """What was scored together: a document, or a batch of them."""

  bpb: float
  text_bytes: int = 0  # 0: not told


@dataclasses.dataclass
class RunRecord:
  """What is told of a run.

  Attributes:
    told: name of a setting, in small letters as the script has it → its value as text.
    losses: step, from 1 → training loss, nats per token.
    seconds: step → seconds of the training clock.
    resolution: how far a printed loss may lie from the loss.
    stages: name → score, in order.
    figures: name → a number: steps, parameters, bytes, seconds.
    scored: which documents → their score with test-time training.
  """

  told: dict[str, str] = dataclasses.field(default_factory=dict)
  losses: dict[int, float] = dataclasses.field(default_factory=dict)
  seconds: dict[int, float] = dataclasses.field(default_factory=dict)
  resolution: float = 0.0
  stages: dict[str, Stage] = dataclasses.field(default_factory=dict)
  figures: dict[str, float] = dataclasses.field(default_factory=dict)
  scored: dict[tuple, Scored] = dataclasses.field(default_factory=dict)


_N = r"([-+]?\d{1,20}(?:\.\d{0,20})?(?:[eE][-+]?\d{1,3})?|nan|inf|-inf)"
_I = r"(\d{1,15})"
_SETTING = re.compile(r"  ([a-z][a-z0-9_]{0,60}): ?(.{0,1000})")
_TRAIN = re.compile(rf"{_I}/\d+ train_loss: {_N} train_time: {_N}m tok/s: {_N}")
_FIRST_TRAIN = re.compile(rf"step:{_I}/\d+ train_loss:{_N}(?: train_time:{_N}ms)?(?: step_avg:\S+)?")
_VALIDATION = re.compile(rf"(?:step:)?{_I}/\d+ val_loss: ?{_N} val_bpb: ?{_N}(?: train_time:{_N}ms)?(?: step_avg:\S+)?")
_STAGE = re.compile(rf"(\S.{{0,100}}?) val_loss:{_N} val_bpb:{_N}(?: eval_time:{_N}ms)?")
_STOP = re.compile(rf"stopping_early: \S+ train_time: ?{_N}ms step: ?{_I}/\d+")
_BATCH = re.compile(rf"ttp: b{_I}/{_I} bl:{_N} bb:{_N} rl:{_N} rb:{_N} dl:{_I}-{_I}\b.*")
_FIGURES = {
  "parameters": re.compile(rf"model_params: ?{_I}"),
  "artifact_bytes": re.compile(rf"Serialized model (?:quantized|int\d)\S*: {_I} bytes.*"),
  "code_bytes": re.compile(rf"Code size(?: \(compressed\))?: {_I} bytes"),
  "total_bytes": re.compile(rf"Total submission size(?: \S+)?: {_I} bytes"),
  "evaluation_seconds": re.compile(rf"total_eval_time:{_N}s"),
  "peak_memory_mib": re.compile(rf"peak memory allocated: {_I} MiB.*"),
}
_PAIRS = re.compile(r"[a-z][a-z0-9_]*:\S+(?: [a-z][a-z0-9_]*:\S+)*")
_ALONE = re.compile(r"(ttt_lora_alpha|ttt_warm_start_a|ttt_weight_decay): (\S{1,40})")

_LONGEST_LINE = 2000


def parse(text: str) -> RunRecord:
  """Returns what a log tells. Of several runs one after another in it, the last one's losses are kept.

  What no line tells is left out; a text that is no log gives an empty record.
  """
  log = RunRecord(resolution=5e-5)
  known = {name.lower() for name in (*env_names(), *FIXED)}
  batch_tokens, in_settings = 0.0, False
  for line in text.splitlines():
    line = line[:_LONGEST_LINE].rstrip()
    if in_settings and (found := _SETTING.fullmatch(line)):
      log.told[found[1]] = found[2].strip()
      continue
    in_settings = line == "Hyperparameters:"
    if found := _TRAIN.fullmatch(line):
      step, rate = _step(log, found), float(found[4])
      batch_tokens = batch_tokens or _number(log.told.get("train_batch_tokens", ""))
      # Minutes have one decimal; the rate has seven digits.
      log.seconds[step] = step * batch_tokens / rate if batch_tokens and rate > 0 else 60 * float(found[3])
      log.figures["tokens_per_second"] = rate
    elif found := _FIRST_TRAIN.fullmatch(line):
      step = _step(log, found)
      if found[3]:
        log.seconds[step] = float(found[3]) / 1000
    elif (found := _VALIDATION.fullmatch(line)) and int(found[1]) > 0:
      log.stages[RAW] = Stage(float(found[3]), float(found[2]))
      log.figures["steps"] = max(int(found[1]), log.figures.get("steps", 0))
    elif found := _STAGE.fullmatch(line):
      _enter_stage(log, found)
    elif found := _STOP.fullmatch(line):
      log.figures |= {"train_seconds": float(found[1]) / 1000, "steps": int(found[2])}
      log.seconds[int(found[2])] = float(found[1]) / 1000
    elif found := _BATCH.fullmatch(line):
      number, of, _, bpb, _, _, shortest, longest = found.groups()
      log.scored["batch", int(number), int(of), int(shortest), int(longest)] = Scored(float(bpb))
    elif found := _ALONE.fullmatch(line):
      log.told[found[1]] = found[2]
    elif figure := next((name for name, form in _FIGURES.items() if form.fullmatch(line)), None):
      log.figures[figure] = float(_FIGURES[figure].fullmatch(line)[1])
    elif _PAIRS.fullmatch(line):
      for name, value in (pair.split(":", 1) for pair in line.split(" ")):
        if name in known:
          log.told.setdefault(name, value)
  log.stages = {name: log.stages[name] for name in sorted(log.stages, key=_place)}
  return log


def _step(log: RunRecord, found: re.Match) -> int:
  """The step of a line of training; enters its loss."""
  step = int(found[1])
  if log.losses and step <= max(log.losses) and step == 1:  # training began again
    log.losses.clear()
    log.seconds.clear()
  log.losses[step] = float(found[2])
  log.figures["steps"] = step
  return step


def _enter_stage(log: RunRecord, found: re.Match) -> None:
  label = found[1].removesuffix("_exact")  # the same score with more digits
  stage = _stage(label)
  seconds = float(found[4]) / 1000 if found[4] else None
  if seconds is None and stage in log.stages:
    seconds = log.stages[stage].seconds
  log.stages[stage] = Stage(float(found[3]), float(found[2]), seconds)


def _stage(label: str) -> str:
  """The stage that a script means by a label; its own label where that is none of ours."""
  words = label.lower()
  if "sliding" in words:
    return label
  if "ttt" in words:
    return TTT
  if "post-ema" in words or "pre-quant" in words:
    return AVERAGED
  if any(word in words for word in ("quantized", "roundtrip", "int6", "int8")):
    return ARTIFACT
  return label


def _place(stage: str) -> int:
  order = (RAW, AVERAGED, ARTIFACT, TTT)
  return order.index(stage) if stage in order else len(order)


def _number(text: str) -> float:
  try:
    return float(text[:40])
  except ValueError:
    return 0.0

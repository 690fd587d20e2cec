"""Several runs under one folder: seeds and sweeps, one run folder each, in one process that compiles once for all.

A set's folder holds nothing but its runs and set.json; what it says is read from the run folders each time.
"""

import dataclasses
import itertools
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from pgolf_jax.errors import Stopped, UserError
from pgolf_jax.report import set_members
from pgolf_jax.report.statistics import paired
from pgolf_jax.run_folder import RunFolder
from pgolf_jax.runtime import distributed
from pgolf_jax.runtime.files import write_json
from pgolf_jax.runtime.log import log
from pgolf_jax.settings import Settings, check
from pgolf_jax.settings.load import changed, env_names, flattened, written
from pgolf_jax.tables import Table, line_width

SCORES = {"plain": "averaged", "artifact": "artifact", "ttt": "ttt"}
"""Stage with a score in bits per byte → its name in tables and JSON."""


@dataclasses.dataclass(frozen=True)
class Member:
  """A run of a set: the name of its folder, and its settings."""

  name: str
  settings: Settings


def members(settings: Settings, seeds: str = "", grid: Sequence[str] = ()) -> list[Member]:
  """Returns the runs of a set: every combination of the values that are swept, its seeds next to each other.

  Args:
    settings: of all.
    seeds: as in "42,0,314"; empty for the settings' own.
    grid: one "name=a,b,c" a setting, by its dotted name, the last part of that, or its environment name; values that
      have commas themselves, such as schedules, are separated by ";".

  Raises:
    UserError: a name or value that is no setting's, one that is given twice, or settings that cannot work.
  """
  axes: dict[str, list[object]] = {}
  for text in grid:
    name, values = _axis(settings, text)
    if name in axes:
      raise UserError(f"--set {name} is given twice; give all its values at once, as in --set {name}=a,b,c.")
    axes[name] = values
  if seeds:
    if "seed" in axes:
      raise UserError("--seeds and --set seed are the same; give one of them.")
    axes["seed"] = _axis(settings, f"seed={seeds}")[1]
  if "seed" in axes:
    axes["seed"] = axes.pop("seed")  # last, so that the seeds of one configuration follow each other
  made = []
  for values in itertools.product(*axes.values()):
    changes = dict(zip(axes, values, strict=True))
    member = Member(_folder_name(changes), changed(settings, changes))
    try:
      check.check(member.settings)
    except UserError as error:
      raise UserError(f"{member.name}: {error}") from error
    made.append(member)
  if len({member.name for member in made}) < len(made):
    made = [dataclasses.replace(member, name=f"{i}-{member.name}") for i, member in enumerate(made, 1)]
  return made


def _axis(settings: Settings, text: str) -> tuple[str, list[object]]:
  """The dotted name and the values of "name=a,b,c"."""
  given, equals, listed = text.partition("=")
  if not equals:
    raise UserError(f"--set {text[:100]} must read name=a,b,c, as in --set matrix_lr=0.02,0.03.")
  name, now = full_name(given.strip().lstrip("-")), flattened(settings)
  if ";" in listed:
    words = listed.split(";")
  else:
    words = [listed] if isinstance(now.get(name), tuple) else listed.split(",")
  words = [word.strip() for word in words]
  if "" in words and not isinstance(now.get(name), str | tuple):
    raise UserError(f"--set {text[:100]} has an empty value; values are separated by one comma, as in name=a,b,c.")
  values = [flattened(changed(settings, {name: _value(word)}))[name] for word in words]
  if len(set(values)) < len(values):
    raise UserError(f"--set {text[:100]} has a value twice.")
  return name, values


def full_name(name: str) -> str:
  """Returns the dotted name of a setting that is given by it, by its last part, or by its environment name.

  A name that is none of these is returned as it is.

  Raises:
    UserError: several settings have that last part.
  """
  dotted = name.replace("-", "_")
  names = list(flattened(Settings()))
  if name in (by_env := env_names()):
    return by_env[name]
  ends = [full for full in names if full.endswith(f".{dotted}")]
  if dotted not in names and len(ends) > 1:
    raise UserError(f"{name} could be {' or '.join(ends)}; give the whole name.")
  return dotted if dotted in names or not ends else ends[0]


def _value(word: str) -> object:
  """A word as the number, truth value or text that a config file would have."""
  for kind in (int, float):
    try:
      return kind(word)
    except ValueError:
      continue
  return {"true": True, "false": False}.get(word.lower(), word)


def _folder_name(changes: Mapping[str, object]) -> str:
  texts = written(changed(Settings(), changes))
  parts = [f"{label}={texts.get(name, 'unset')}" for name, label in _labels(changes).items()]
  return re.sub(r"[^\w.=@+-]+", "-", "_".join(parts))[:150]


def _labels(names: Iterable[str]) -> dict[str, str]:
  """Dotted name → its last part, or the whole where two have the same last part."""
  lasts = {name: name.rpartition(".")[2] for name in names}
  return {name: name if list(lasts.values()).count(last) > 1 else last for name, last in lasts.items()}


def run(folder: Path, made: Sequence[Member], one: Callable[[Settings, Path], int]) -> int:
  """Runs every member that is not complete, then prints and writes what the set comes to. Returns the exit status.

  A member that fails is named and does not hold up the others; the status is 1 if one failed or broke a rule.

  Args:
    one: runs a member in its folder, and returns its exit status.

  Raises:
    UserError: the folder is a run's.
    Stopped: a signal came; the member under way is saved.
  """
  if (folder / "config.toml").exists():
    raise UserError(f"{folder} is the folder of one run; give the set another with --out.")
  folder.mkdir(parents=True, exist_ok=True)
  failed: dict[str, str] = {}
  for number, member in enumerate(made, 1):
    print(f"set {folder}: run {number} of {len(made)}, {member.name}", flush=True)
    try:
      status = one(member.settings, folder / member.name)
    except Stopped:
      raise
    except Exception as error:  # whatever ends one run must not end the others
      reason = (str(error) or type(error).__name__).splitlines()[0]
      failed[member.name] = reason if isinstance(error, UserError) else f"{type(error).__name__}: {reason}"
      print(f"{member.name} failed: {failed[member.name]}", flush=True)
      continue
    if status:
      failed[member.name] = "its audit found a broken rule"
  found = summary(folder, [member.name for member in made])
  found["failed"] = failed
  if distributed.is_leader():
    write_json(folder / "set.json", found)
  log.info("\n%s", table(found))
  return 1 if failed else 0


def summary(folder: Path, given: Sequence[str] = ()) -> dict:
  """Returns the results of a set: every run, and for each configuration n, mean, deviation and best of each score.

  A configuration is all settings but the seed; it is named by the settings in which the set's runs differ. Deviations
  are those of samples, None for one run; scores are bits per byte. Differences are those from the first configuration,
  paired by seed: mean, standard error, number of seeds and Student's two-sided p.

  Args:
    folder: of the set.
    given: names of the runs that come first; others follow as `set_members` has them.
  """
  found = {}
  for path in set_members(folder, given):
    try:
      found[path.name] = RunFolder(path)
    except UserError as error:
      log.warning("%s is left out: %s", path, error)
  texts = {name: written(run.settings) for name, run in found.items()}
  names = list(dict.fromkeys(name for values in texts.values() for name in values if name != "seed"))
  varied = [name for name in names if len({values.get(name) for values in texts.values()}) > 1]
  rows, configurations = [], {}
  for name, run in found.items():
    scores = {SCORES[stage]: result["bpb"] for stage, result in run.figures().items() if stage in SCORES}
    chosen = {key: texts[name].get(key) for key in varied}
    rows.append({"run": name, "seed": run.settings.seed, "settings": chosen, "bpb": scores})
    configurations.setdefault(tuple(chosen.values()), []).append(rows[-1])
  first = next(iter(configurations.values()), [])
  return {
    "set": folder.name,
    "runs": rows,
    "configurations": [
      {
        "settings": group[0]["settings"],
        "runs": [row["run"] for row in group],
        "scores": _scores(group),
        "differences": {} if group is first else _differences(first, group),
      }
      for group in configurations.values()
    ],
  }


def _differences(first: Sequence[dict], rows: Sequence[dict]) -> dict[str, dict]:
  """Score's name → how much higher it is than in the first configuration, over the seeds that both have."""
  by_seed = {row["seed"]: row["bpb"] for row in first}
  differences = {}
  for name in SCORES.values():
    pairs = [(row["bpb"], by_seed[row["seed"]]) for row in rows if row["seed"] in by_seed]
    both = [(base[name], score[name]) for score, base in pairs if name in score and name in base]
    if both:
      difference = paired(*zip(*both, strict=True))
      differences[name] = {key: getattr(difference, key) for key in ("mean", "error", "count", "p")}
  return differences


def _scores(rows: Sequence[dict]) -> dict[str, dict]:
  """Score's name → n, mean, deviation and best of the runs that have it."""
  scores = {}
  for name in SCORES.values():
    values = {row["run"]: row["bpb"][name] for row in rows if name in row["bpb"]}
    if values:
      best = min(values, key=values.__getitem__)
      deviation = statistics.stdev(values.values()) if len(values) > 1 else None
      mean = statistics.fmean(values.values())
      scores[name] = {"n": len(values), "mean": mean, "deviation": deviation, "best": values[best], "best_run": best}
  return scores


def table(found: dict, width: int | None = None) -> str:
  """Returns the results of a set as text: a row for each configuration and score, best mean first.

  Args:
    found: what `summary` returns.
    width: columns of a line, as many as there are if not given.
  """
  configurations = found["configurations"]
  labels = _labels(configurations[0]["settings"] if configurations else ())

  def final(group: dict) -> float:
    return list(group["scores"].values())[-1]["mean"] if group["scores"] else math.inf

  rows = []
  for group in sorted(configurations, key=final):
    name = " ".join(f"{labels[key]}={value}" for key, value in group["settings"].items()) or found["set"]
    for score, s in group["scores"].items():
      deviation = "" if s["deviation"] is None else f"± {s['deviation']:.5f}"
      gap = _gap(group["differences"].get(score))
      rows.append([name, score, str(s["n"]), f"{s['mean']:.5f}", deviation, *gap, f"{s['best']:.5f}", s["best_run"]])
    if not group["scores"]:
      rows.append([name, "no score yet", *[""] * 7])
  head = ["configuration", "bits per byte", ">n", ">mean", ">deviation", ">Δ by seed", ">p", ">best", "best run"]
  shown = [i for i, name in enumerate(head) if any(row[i] for row in rows) or name not in (">Δ by seed", ">p")]
  head, *rows = ([line[i] for i in shown] for line in (head, *rows))
  text = Table(head, rows).text(line_width() if width is None else width)
  failures = [f"failed: {name}: {reason}" for name, reason in found.get("failed", {}).items()]
  return "\n".join([text, *failures])


def _gap(difference: dict | None) -> tuple[str, str]:
  """A difference ± its standard error, and its p."""
  if difference is None:
    return "", ""
  error = "" if difference["error"] is None else f" ± {difference['error']:.5f}"
  return f"{difference['mean']:+.5f}{error}", "" if difference["p"] is None else f"{difference['p']:.1g}"

"""The verbs beside PyTorch: `pgolf parity` and `pgolf convert`."""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

from pgolf_jax.settings.arguments import Positional, Repeated


def run(
  case: Positional[Path],
  out: Path,
  dtype: Literal["float32", "bfloat16"] | None = None,
  tokenizer: Path | None = None,
) -> None:
  """Write our outputs for a golden case, under the names of its expected file.

  Example: pgolf parity run tests/golden/forward --out ours.safetensors

  Args:
    case: folder of the case.
    out: file to write: safetensors, or JSON lines for the kind `caseops`.
    dtype: type to compute in, in place of the one that the reference computed in.
    tokenizer: SentencePiece model of a `caseops` case, if it is not beside the case.
  """
  from pgolf_jax.parity import Case, write_outputs
  from pgolf_jax.parity import run as parity_run
  from pgolf_jax.runtime import distributed

  distributed.start()
  outputs = parity_run.run(Case.load(case, dtype=dtype, tokenizer=tokenizer))
  write_outputs(out, outputs)
  print(f"{len(outputs)} {'tensors' if isinstance(outputs, dict) else 'documents'} written to {out}")


def check(
  case: Positional[Path | None] = None,
  all: bool = False,
  ours: Path | None = None,
  dtype: Literal["float32", "bfloat16", "float64"] | None = None,
  tensors: bool = False,
  json: Path | None = None,
  tokenizer: Path | None = None,
) -> int:
  """Compare a golden case, or all of a folder, with what this installation computes on this device.

  Prints the errors beside their limits and the perturbation floor, in the reference's type, in bfloat16 and in float64
  side by side; exit status 1 if an error is too large. The floor is how far an output moves when every weight moves by
  one part in ten million. On an accelerator, and in another type than the reference's, limits are derived from it.
  docs/parity.md says how to read the table.

  Example: pgolf parity check --all

  Args:
    case: folder of the case; with --all a folder of cases, or nothing for the small cases that come with the package.
    all: check all cases of the folder.
    ours: file that `pgolf parity run` wrote; the case is run now if not given.
    dtype: the only type to compute in; float64 for forward and optimizer cases, where the device has it.
    tensors: print one row per tensor instead of one per quantity.
    json: file to write everything to that was found, tensor by tensor.
    tokenizer: SentencePiece model of a `caseops` case, if it is not beside the case.
  """
  from pgolf_jax.errors import UserError
  from pgolf_jax.parity import Case, find_cases, shipped_cases, table
  from pgolf_jax.parity import check as parity_check
  from pgolf_jax.runtime import distributed
  from pgolf_jax.runtime.files import write_json

  if not all and case is None:
    raise UserError("Name the folder of a golden case, or ask for all that come with the package with --all.")
  if all and ours is not None:
    raise UserError("--ours holds the outputs of one case; name that case in place of --all.")
  distributed.start()
  folders = find_cases(case or shipped_cases()) if all else [case]
  found = table.environment()
  print(table.environment_text(found) + "\n", flush=True)
  reports = []
  for folder in folders:
    this = Case.load(folder, tokenizer=tokenizer)
    report = parity_check.examine(this, dtype, this.read_outputs(ours) if ours else None)
    print(table.text(report, tensors=tensors) + "\n", flush=True)
    reports.append(report)
  if json is not None:
    write_json(json, table.as_json(reports, found))
  failed = [report.case.folder.name for report in reports if not report.ok]
  print(f"{len(reports) - len(failed)} of {len(reports)} cases agree{': not ' + ', '.join(failed) if failed else ''}.")
  return int(bool(failed))


def compare(
  a: Positional[Path],
  b: Positional[Path],
  noise: Path | None = None,
  out: Path | None = None,
  json: bool = False,
  every_setting: bool = False,
) -> None:
  """Set two runs side by side: settings that differ, losses by step, scores by stage, times, and where they part.

  Each is a run folder, a metrics.jsonl, or the log that a PyTorch script of the challenge printed. They part where the
  mean difference of their losses is more than noise explains: the noise from step to step, and with --noise also that
  between two runs of A's settings. Scores of the same documents are compared in pairs.

  Example: pgolf parity compare runs/jax logs/torch.log --out compare

  Args:
    a: the first run.
    b: the second run; differences are B less A.
    noise: a second run of A's settings, such as another seed; what it differs by from A counts as noise.
    out: folder for compare.txt, compare.json and compare.png (needs the extra `report`).
    json: print JSON instead of the table.
    every_setting: list all settings that differ, not the first twenty.
  """
  from json import dumps

  from pgolf_jax.parity import compare_page
  from pgolf_jax.parity.compare import compare as compare_sides
  from pgolf_jax.parity.compare import read

  compared = compare_sides(read(a), read(b), None if noise is None else read(noise))
  if json:
    print(dumps(compare_page.as_json(compared), allow_nan=False))
  else:
    print(compare_page.table(compared, every_setting=every_setting))
  if out is not None:
    written = compare_page.write(compared, out)
    print("\n".join(written), file=sys.stderr if json else sys.stdout)


def dump(
  script: Positional[Path],
  kind: Literal["forward", "optimizer", "train", "quantize", "ngram", "ttt"],
  out: Path,
  checkpoint: Path | None = None,
  base: Literal["tiny", "record", "script"] | None = None,
  set: Repeated[str] = (),
  tokens: int = 512,
  documents: int = 8,
  max_doc_len: int | None = None,
  steps: int | None = None,
  seed: int = 0,
  data: Path | None = None,
  noise: float | None = None,
  activations: bool = False,
  floor: bool = True,
  device: Literal["cpu", "cuda"] = "cpu",
) -> None:
  """Make a golden case from your own PyTorch training script, for `pgolf parity check`.

  The script is a module with `GPT` and `Hyperparameters` that takes its settings from the environment, as the recipe's
  does. It is imported, its functions are called in float32, its main() never is. Triton, FlashAttention and a GPU are
  not needed: plain PyTorch of the same meaning stands in, and case.json says where.

  Example: pgolf parity dump train_gpt.py --kind forward --out cases/forward

  Args:
    script: the PyTorch script.
    kind: what to dump: forward (loss, gradients, logits), optimizer (its steps), train (the loop), quantize (GPTQ with
      its corrections), ngram (hints), ttt (evaluation with test-time training).
    out: folder to make.
    checkpoint: weights to start from: a state dict in a .pt file, which is read without executing anything, or
      .safetensors; else the script's initial weights.
    base: settings that the environment leaves open: a tiny model's, the record's, or the script's own defaults; with
      a checkpoint the script's, else tiny ones.
    set: a setting by its environment name, as in MODEL_DIM=64; may be given several times.
    tokens: tokens of the packed row, or of the stream (train: of the validation stream).
    documents: documents of mixed length in it.
    max_doc_len: longest segment that attention sees of a document, in a packed row; by default the mean length.
    steps: optimizer steps; 4, or 12 of train.
    seed: of initial weights, noise and random text.
    data: folder of shards to take the text from, instead of random documents.
    noise: noise on the weights that the case starts from, relative to a typical weight; 0.3, but none on a checkpoint
      and in train.
    activations: in a forward case, also keep what every layer computes, so that a mistake shows where it was made.
    floor: compute everything once more from weights moved by 1e-7, to record how far the script's own outputs move.
    device: where PyTorch computes.
  """
  from importlib.util import find_spec

  from pgolf_jax.errors import UserError

  if find_spec("torch") is None:
    raise UserError("PyTorch is not installed; pip install 'pgolf_jax[torch]' installs it.")
  from pgolf_jax.parity.dump import NOISE, Request
  from pgolf_jax.parity.dump import dump as make

  for item in set:
    if "=" not in item:
      raise UserError(f"--set {item} must read NAME=VALUE, as in --set MODEL_DIM=64.")
  changes = dict(item.split("=", 1) for item in set)
  steps = (12 if kind == "train" else 4) if steps is None else steps
  noise = (0.0 if checkpoint or kind == "train" else NOISE) if noise is None else noise
  base = ("script" if checkpoint else "tiny") if base is None else base
  request = Request(script, kind, out, checkpoint, base, changes, tokens, documents, max_doc_len, steps, seed, data)
  case = make(dataclasses.replace(request, noise=noise, activations=activations, floor=floor, device=device))
  about = case.about["made_from"]
  size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
  print(f"{out}: {kind}, {size / 1e6:.2f} MB, from {script} on {about['device']}")
  for name, place in about["stand_ins"].items():
    print(f"  stand-in for {name}: {place}")
  if about["settings_assumed"]:
    print(f"  the script says nothing of {', '.join(about['settings_assumed'])}; assumed as in our defaults")
  print(f"Next: pgolf parity check {out}")


def convert(
  source: Positional[Path],
  target: Positional[Path],
  config: Path | None = None,
  weights: Literal["averaged", "raw"] = "averaged",
  key: str | None = None,
  form: Literal["pt", "safetensors", "orbax", "run"] | None = None,
  by_layer: bool = False,
) -> None:
  """Write weights in another form: PyTorch state dict, safetensors, Orbax checkpoint or run folder.

  Every bit is kept, and names are the recipe's, so that the PyTorch script's own model loads what is written. Shapes
  are checked against the config, or against each other where there is none. Nothing in a PyTorch file is executed. An
  artifact's weights come out dequantised. From a run folder `pgolf eval --weights averaged`, `pgolf quantize` and
  `pgolf run` go on.

  Example: pgolf convert final_model.pt runs/torch --config configs/record_8xh100.toml

  Args:
    source: .pt, .safetensors, artifact, Orbax checkpoint, run folder, or one of its checkpoints/STEP.
    target: file or folder to make: .pt, .safetensors, .orbax (a bare Orbax checkpoint), or else a run folder.
    config: settings of the model; needed for a run folder unless they lie beside the weights.
    weights: of a run: its moving average, or the weights of the last step.
    key: entry of a PyTorch file that is the state dict, where it holds several.
    form: of the target, where its name does not tell.
    by_layer: write matrices one by one (blocks.0.attn.c_q.weight), as scripts without banks have them.
  """
  from pgolf_jax.parity.convert import Choices
  from pgolf_jax.parity.convert import convert as convert_weights
  from pgolf_jax.runtime import distributed
  from pgolf_jax.settings.arguments import settings_of

  distributed.leave_devices()
  settings = None if config is None else settings_of(config)
  print("\n".join(convert_weights(source, target, Choices(settings, weights, key, form, by_layer))))


COMMANDS = {
  "parity": {"run": run, "check": check, "compare": compare, "dump": dump},
  "convert": {"": convert},
}

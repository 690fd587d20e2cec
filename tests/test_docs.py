"""The pages keep their word: links lead somewhere, and every command in them is run."""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pgolf_jax.cli import VERBS
from pgolf_jax.cli import commands as commands_of
from pgolf_jax.data.corpus import Position
from pgolf_jax.data.folder import default_corpus
from pgolf_jax.settings.arguments import Defaults
from pgolf_jax.settings.options import Options, parameters_of

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
_LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
_BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)

ELSEWHERE = {
  "git clone": "the address is the reader's",
  "cd pgolf_jax": "what was cloned",
  ". .venv": "tests run in an environment already",
  "python3 -m venv": "tests run in an environment already",
  "pip install": "tests/test_wheel.py",
  "make demo": "docs/quickstart.md runs the same verb",
  "make test": "is this suite",
  "make lint": "is the other half of .ci/run",
  "pgolf parity dump": "needs PyTorch and a script; tests/parity/test_dump.py",
  "pgolf parity check cases": "the case of the dump before it",
  "pgolf convert final_model.pt": "tests/parity/test_convert.py",
  "pgolf parity compare": "tests/parity/test_compare.py",
  "pgolf data download": "needs the network; tests/data/test_download.py",
}
"""Beginning of a command that no page's run executes → why, or where it is tested."""

SMALL = {
  "VOCAB_SIZE": "512", "NUM_LAYERS": "3", "MODEL_DIM": "32", "NUM_HEADS": "2", "NUM_KV_HEADS": "1", "MLP_MULT": "2",
  "NUM_LOOPS": "0", "PARALLEL_START_LAYER": "2", "XSA_LAST_N": "3", "ROPE_DIMS": "8",
  "ITERATIONS": "3", "TRAIN_BATCH_TOKENS": "512", "TRAIN_SEQ_SCHEDULE": "128@1.0", "TRAIN_SEQ_LEN": "128",
  "EVAL_SEQ_LEN": "128", "VAL_BATCH_TOKENS": "4096", "WARMUP_STEPS": "1", "GPTQ_CALIBRATION_BATCHES": "1",
  "TTT_EVAL_SEQ_LEN": "128", "TTT_LORA_RANK": "2",
}  # fmt: skip
"""Settings that make a page's models small. Options on a page's own command lines go over them."""


def slug(heading: str) -> str:
  """The anchor that GitHub gives a heading."""
  return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
  return {slug(line.lstrip("#")) for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("#")}


def blocks(page: Path) -> list[tuple[str, str]]:
  """(language, text) of the blocks of a page that are run."""
  return _BLOCK.findall(page.read_text(encoding="utf-8"))


def commands(text: str) -> list[str]:
  """The commands of a block of shell, without comments; lines that end in a backslash are joined."""
  lines = text.replace("\\\n", " ").splitlines()
  parts = [" ".join(shlex.split(line, comments=True, posix=False)) for line in lines]
  return [command.strip() for line in parts for command in line.split("&&") if command.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
  for target in _LINK.findall(page.read_text(encoding="utf-8")):
    if target.startswith("http"):
      assert target.startswith("https://github.com/openai/parameter-golf"), f"{target}: an address nobody checked"
      continue
    name, _, anchor = target.partition("#")
    path = (page.parent / name).resolve() if name else page
    assert path.exists(), f"{page.name} links to {target}"
    if anchor:
      assert anchor in anchors(path), f"{page.name} links to {target}"


def test_every_page_of_docs_can_be_reached_from_the_readme():
  reached, waiting = set(), [ROOT / "README.md"]
  while waiting:
    page = waiting.pop()
    if page in reached or page.suffix != ".md":
      continue
    reached.add(page)
    targets = [target.partition("#")[0] for target in _LINK.findall(page.read_text(encoding="utf-8"))]
    waiting += [(page.parent / name).resolve() for name in targets if name and not name.startswith("http")]
  assert set(PAGES) - reached == set()


def spoken(page: Path) -> list[str]:
  """The commands of `pgolf` on a page: in blocks, and in the text between backticks."""
  text = page.read_text(encoding="utf-8")
  inside = [command for language, block in blocks(page) if language == "sh" for command in commands(block)]
  inside += [piece for piece in re.findall(r"`([^`\n]+)`", _BLOCK.sub("", text)) if "…" not in piece]
  parts = [re.sub(r"^(\w+=\S+ )*", "", part.strip()) for command in inside for part in re.split(r"&&|\|", command)]
  return [part for part in parts if part.startswith("pgolf ") and "VERB" not in part]


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "log.md"], ids=lambda page: page.name)
def test_every_command_that_a_page_names_can_be_read(page):
  for command in spoken(page):
    _, verb, *words = shlex.split(command)
    if verb in ("help", "--version"):
      continue
    assert verb in VERBS, command
    choices = commands_of(verb)
    name = "" if "" in choices else words.pop(0) if words else None
    if name is None:
      continue  # `pgolf data` names the verb alone
    assert name in choices, command
    function = choices[name]
    function = function.function if isinstance(function, Defaults) else function
    options = Options(command, parameters_of(function))
    words = ["1" if word == "N" else word for word in words if not word.startswith("--help")]
    options.parse(options.normal(words))  # raises what a person would read


def environment(folder: Path) -> dict[str, str]:
  return os.environ | SMALL | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PGOLF_CACHE": str(folder / "cache"),
    "XLA_FLAGS": "",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
  }  # fmt: skip


def carry_out(language: str, step: str, folder: Path, cache: Path) -> None:
  command = ["bash", "-c", step] if language == "sh" else [sys.executable, "-c", step]
  done = subprocess.run(command, cwd=folder, env=environment(cache), capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, f"{step}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
  """Folder with `runs/demo`, a small run, as the quick start leaves it, and the cache of its data."""
  folder = tmp_path_factory.mktemp("home")
  carry_out("sh", "pgolf train demo && pgolf quantize runs/demo", folder, folder)
  return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_every_command_of_a_page_works(page, tmp_path, home):
  corpus, _ = default_corpus()
  speeches = [document.raw.decode() for _, document, _ in itertools.islice(corpus.read(Position()), 30)]
  for name, texts in (("web.jsonl", speeches[3:]), ("heldout.jsonl", speeches[:3])):
    (tmp_path / name).write_text("".join(json.dumps({"text": text[:5000]}) + "\n" for text in texts))
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  if "pgolf run demo\n" not in page.read_text(encoding="utf-8"):
    shutil.copytree(home / "runs", tmp_path / "runs")
  for language, text in blocks(page):
    for step in commands(text) if language == "sh" else [text]:
      if language == "python" or not any(step.startswith(beginning) for beginning in ELSEWHERE):
        carry_out(language, step, tmp_path, home)

"""Downloading the published data sets from the Hugging Face hub."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import huggingface_hub

from pgolf_jax.data.manifest import TOKENIZER
from pgolf_jax.data.shards import list_shards, read_count
from pgolf_jax.data.tokenizer import Tokenizer
from pgolf_jax.errors import UserError
from pgolf_jax.runtime.log import progress

ALL_SHARDS = 80  # of training, in the record's data


@dataclasses.dataclass(frozen=True)
class Published:
  """A data set on the hub.

  Attributes:
    repo: name of the hub repository, of kind "dataset".
    shards: name of its folder of shards; None for raw documents.
    files: base names of the files to fetch besides shards.
    has_sidecar: whether there is a byte sidecar.
  """

  repo: str
  shards: str | None
  files: tuple[str, ...]
  has_sidecar: bool = False


PUBLISHED = {
  "caseops": Published(
    "romeerp/parameter-golf-caseops-v1",
    "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved",
    ("fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model",),
    has_sidecar=True,
  ),
  "sp1024": Published("willdepueoai/parameter-golf", "fineweb10B_sp1024", ("fineweb_1024_bpe.model",)),
  "documents": Published("willdepueoai/parameter-golf", None, ("docs_selected.jsonl",)),
}


def download(name: str, folder: Path, train_shards: int = ALL_SHARDS) -> list[Path]:
  """Fetches the data set `name` into `folder`, except for complete files that are there already.

  Shards retain their names, the tokenizer becomes `tokenizer.model`. An interrupted download continues where it was.

  Args:
    name: a key of `PUBLISHED`.
    folder: where the files go; made if it does not exist.
    train_shards: number of training shards to fetch, from the first.

  Returns:
    The files, in name order.

  Raises:
    UserError: the name is unknown, there are fewer shards, there is no connection, or a file is damaged.
  """
  if name not in PUBLISHED:
    raise UserError(f"no published data set {name!r}; choose one of {', '.join(PUBLISHED)}")
  published, folder = PUBLISHED[name], Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  remote = _listing(published.repo)
  wanted = _wanted(published, remote, train_shards)
  with progress(f"downloading {name}", total=len(wanted), unit="files") as bar:
    for target, source in wanted.items():
      bar.note(target)
      _fetch(published.repo, source, folder / target)
      bar.advance()
  if published.shards is not None:
    _compare_with_manifest(published, remote, folder, complete=train_shards == _count(published, remote, "train"))
  shutil.rmtree(folder / _PARTS, ignore_errors=True)
  return [folder / target for target in sorted(wanted)]


_PARTS = ".downloading"  # where the hub's client keeps unfinished files


def _listing(repo: str) -> list[str]:
  try:
    return sorted(huggingface_hub.list_repo_files(repo, repo_type="dataset"))
  except Exception as error:  # the hub's client lets through whatever its HTTP library raises
    raise UserError(f"cannot list {repo} on the Hugging Face hub ({error}); check the connection") from error


def _shards(published: Published, remote: Sequence[str], split: str) -> list[str]:
  start = f"fineweb_{split}_"
  return [
    path
    for path in remote
    if (parts := PurePosixPath(path)).parent.name == published.shards
    and parts.name.startswith(start)
    and parts.name.removeprefix(start).removesuffix(".bin").isdigit()
  ]


def _count(published: Published, remote: Sequence[str], split: str) -> int:
  return len(_shards(published, remote, split))


def _wanted(published: Published, remote: Sequence[str], train_shards: int) -> dict[str, str]:
  """Returns name in the folder → path in the repository."""
  wanted = {}
  if published.shards is not None:
    train = _shards(published, remote, "train")
    if not 1 <= train_shards <= len(train):
      raise UserError(
        f"{published.repo} has {len(train)} training shards; ask for 1 to {len(train)}, not {train_shards}"
      )
    others = ["val", "val_bytes"] if published.has_sidecar else ["val"]
    for path in train[:train_shards] + [path for split in others for path in _shards(published, remote, split)]:
      wanted[PurePosixPath(path).name] = path
  for name in published.files:
    paths = [path for path in remote if PurePosixPath(path).name == name]
    if not paths:
      raise UserError(f"{published.repo} no longer has {name}; look for it on the Hugging Face hub by hand")
    wanted[TOKENIZER if name.endswith(".model") else name] = paths[0]
  return wanted


def _fetch(repo: str, source: str, target: Path) -> None:
  if target.exists():
    try:
      _check(target)
      return
    except UserError:
      target.unlink()
  try:
    fetched = Path(huggingface_hub.hf_hub_download(repo, source, repo_type="dataset", local_dir=target.parent / _PARTS))
  except Exception as error:  # as in _listing
    raise UserError(f"cannot fetch {source} from {repo} ({error}); run the same command again to continue") from error
  try:
    _check(fetched, name=target.name)
  except UserError:
    fetched.unlink()  # otherwise the client would take it for a complete download
    raise
  fetched.replace(target)


def _check(path: Path, name: str | None = None) -> None:
  """Raises UserError for a shard whose header or size is wrong, and for a tokenizer that does not load."""
  name = name or path.name
  if name.endswith(".bin"):
    read_count(path)
  elif name == TOKENIZER:
    Tokenizer.load(path)


def _compare_with_manifest(published: Published, remote: Sequence[str], folder: Path, *, complete: bool) -> None:
  """Compares token counts with the publisher's manifest, and the sidecar's length with the validation tokens'."""
  tokens = {split: sum(map(read_count, list_shards(folder, split))) for split in ("train", "val")}
  if published.has_sidecar:
    sidecar = sum(map(read_count, list_shards(folder, "val_bytes")))
    if sidecar != tokens["val"]:
      raise UserError(f"{folder}: {sidecar} sidecar entries for {tokens['val']} validation tokens; fetch both again")
  manifests = [path for path in remote if PurePosixPath(path).name == "manifest.json"]
  if not manifests:
    return
  _fetch(published.repo, manifests[0], folder / "published_manifest.json")
  datasets = json.loads((folder / "published_manifest.json").read_text()).get("datasets", [])
  stats = next((entry.get("stats") or {} for entry in datasets if entry.get("name") == published.shards), {})
  for split, count in tokens.items():
    expected = stats.get(f"tokens_{split}")
    if expected is not None and (split == "val" or complete) and expected != count:
      raise UserError(
        f"{folder}: {count} {split} tokens, the publisher's manifest has {expected}; delete the {split} shards and "
        "fetch them again"
      )

"""Downloading the published data sets from the Hugging Face hub.

The hub announces the size and hash of every file. What arrives is compared with both, and what lies in the folder from
an earlier download too, so that no file is taken for complete that is damaged or of another version.
"""

import dataclasses
import hashlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import huggingface_hub

from pgolf_jax.data.manifest import TOKENIZER
from pgolf_jax.data.shards import list_shards, read_count
from pgolf_jax.data.sidecar import write_sidecar
from pgolf_jax.data.tokenizer import Tokenizer
from pgolf_jax.data.tokenizer_model import MAX_BYTES
from pgolf_jax.errors import UserError
from pgolf_jax.runtime.files import read_json
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


@dataclasses.dataclass(frozen=True)
class Remote:
  """A file of a hub repository, as the hub announces it."""

  path: str
  size: int
  digest: str  # SHA-256 of a file under LFS, else the SHA-1 that git gives it

  def matches(self, path: Path) -> bool:
    """Tells whether the file at `path` is this one."""
    if path.stat().st_size != self.size:
      return False
    if len(self.digest) == 64:
      digest = hashlib.sha256()
    else:
      digest = hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
      while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest() == self.digest


Listing = Mapping[str, Remote]
"""Path in the repository → file."""


def download(name: str, folder: Path, train_shards: int = ALL_SHARDS) -> list[Path]:
  """Fetches the data set `name` into `folder`, except for complete files that are there already.

  Shards retain their names, the tokenizer becomes `tokenizer.model`, and a sidecar that is missing is made from it. An
  interrupted download continues where it was.

  Args:
    name: a key of `PUBLISHED`.
    folder: where the files go; made if it does not exist.
    train_shards: number of training shards to fetch, from the first.

  Returns:
    The files, in name order.

  Raises:
    UserError: the name is unknown, there are fewer shards, there is no connection, or a file is damaged, too large or
      not what the hub announced.
  """
  if name not in PUBLISHED:
    raise UserError(f"there is no published data set {name}; choose one of {', '.join(PUBLISHED)}")
  published, folder = PUBLISHED[name], Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  remote = _listing(published.repo)
  wanted = _wanted(published, remote, train_shards)
  with progress(f"downloading {name}", total=len(wanted), unit="files") as bar:
    for target, source in wanted.items():
      bar.note(target)
      _fetch(published.repo, remote[source], folder / target)
      bar.advance()
  if published.shards is not None:
    _compare_with_manifest(published, remote, folder, complete=train_shards == _count(published, remote, "train"))
    if not published.has_sidecar:
      write_sidecar(folder, Tokenizer.load(folder / TOKENIZER))
  shutil.rmtree(folder / _PARTS, ignore_errors=True)
  return [folder / target for target in sorted(wanted)]


_PARTS = ".downloading"  # where the hub's client keeps unfinished files
_PUBLISHED_MANIFEST = "published_manifest.json"
# End of a file's name here → the most bytes that it may have.
_MOST = {".bin": 1 << 30, ".model": MAX_BYTES, ".json": 1 << 24, ".jsonl": 1 << 37}
_PATH = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*")  # no "..", nothing hidden


def _listing(repo: str) -> Listing:
  """The repository's files in name order; those of a name that could lead out of a folder are left out."""
  try:
    entries = list(huggingface_hub.list_repo_tree(repo, recursive=True, repo_type="dataset"))
    files = [entry for entry in entries if isinstance(entry, huggingface_hub.hf_api.RepoFile)]
    remote = [Remote(file.path, file.size, file.lfs.sha256 if file.lfs else file.blob_id) for file in files]
  except Exception as error:  # the hub's client lets through whatever its HTTP library raises
    raise UserError(f"cannot list {repo} on the Hugging Face hub ({error}); check the connection") from error
  return {file.path: file for file in sorted(remote, key=lambda file: file.path) if _PATH.fullmatch(file.path)}


def _shards(published: Published, remote: Listing, split: str) -> list[str]:
  name = re.compile(rf"fineweb_{split}_[0-9]{{1,9}}\.bin")
  folders = {path: PurePosixPath(path).parent.name for path in remote}
  return [path for path in remote if folders[path] == published.shards and name.fullmatch(PurePosixPath(path).name)]


def _count(published: Published, remote: Listing, split: str) -> int:
  return len(_shards(published, remote, split))


def _wanted(published: Published, remote: Listing, train_shards: int) -> dict[str, str]:
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


def _fetch(repo: str, source: Remote, target: Path) -> None:
  if target.is_file():
    if source.matches(target):
      return
    target.unlink()
  if source.size > _MOST[target.suffix]:
    raise UserError(f"{source.path} of {repo} has {source.size} bytes, more than {_MOST[target.suffix]} for {target}")
  parts = target.parent / _PARTS
  try:
    fetched = Path(huggingface_hub.hf_hub_download(repo, source.path, repo_type="dataset", local_dir=parts))
  except Exception as error:  # as in _listing
    raise UserError(
      f"cannot fetch {source.path} from {repo} ({error}); run the same command again to continue"
    ) from error
  try:
    if not source.matches(fetched):
      raise UserError(f"{source.path} of {repo} is not what the hub announced (size or hash); run the command again")
    _check(fetched, name=target.name)
  except UserError:
    fetched.unlink()  # otherwise the client would take it for a complete download
    raise
  fetched.replace(target)


def _check(path: Path, name: str) -> None:
  """Raises UserError for a shard with a wrong header or size, and for a tokenizer or a manifest that does not load."""
  if name.endswith(".bin"):
    read_count(path)
  elif name == TOKENIZER:
    Tokenizer.load(path)
  elif name == _PUBLISHED_MANIFEST:
    _published_stats(path, "")


def _published_stats(path: Path, shards: str) -> dict:
  """What the publisher's manifest counts in a folder of shards; nothing if it does not name the folder."""
  datasets = read_json(path).get("datasets", [])
  if not isinstance(datasets, list) or not all(isinstance(entry, dict) for entry in datasets):
    raise UserError(f'{path}: its "datasets" are no list of objects, so it is damaged.')
  stats = next((entry.get("stats") or {} for entry in datasets if entry.get("name") == shards), {})
  if not isinstance(stats, dict):
    raise UserError(f'{path}: the "stats" of {shards} are no object, so it is damaged.')
  return stats


def _compare_with_manifest(published: Published, remote: Listing, folder: Path, *, complete: bool) -> None:
  """Compares token counts with the publisher's manifest, and the sidecar's length with the validation tokens'."""
  tokens = {split: sum(map(read_count, list_shards(folder, split))) for split in ("train", "val")}
  if published.has_sidecar:
    sidecar = sum(map(read_count, list_shards(folder, "val_bytes")))
    if sidecar != tokens["val"]:
      raise UserError(f"{folder}: {sidecar} sidecar entries for {tokens['val']} validation tokens; fetch both again")
  manifests = [path for path in remote if PurePosixPath(path).name == "manifest.json"]
  if not manifests:
    return
  path = folder / _PUBLISHED_MANIFEST
  _fetch(published.repo, remote[manifests[0]], path)
  try:
    stats = _published_stats(path, published.shards)
  except UserError:
    path.unlink()  # so that the next run fetches it
    raise
  for split, count in tokens.items():
    expected = stats.get(f"tokens_{split}")
    if expected is not None and (split == "val" or complete) and expected != count:
      raise UserError(
        f"{folder}: {count} {split} tokens, the publisher's manifest has {expected}; delete the {split} shards and "
        "fetch them again"
      )

"""The golden `caseops` case: documents as rewritten text, token ids and bytes per token."""

import json
from pathlib import Path

from pgolf_jax.data import caseops
from pgolf_jax.data.encode import token_bytes
from pgolf_jax.data.tokenizer import Tokenizer
from pgolf_jax.errors import UserError
from pgolf_jax.parity.case import Case


def run_caseops(case: Case) -> list[dict]:
  """Rewritten text, ids without the leading bos, bytes per token and their sums, for each document of the case."""
  tokenizer = Tokenizer.load(case.tokenizer or _find_tokenizer(case))
  lines = (case.folder / "docs.jsonl").read_text(encoding="utf-8").splitlines()
  return [_document(json.loads(line)["text"], tokenizer) for line in lines]


def _document(text: str, tokenizer: Tokenizer) -> dict:
  coded = caseops.encode(text)
  ids = tokenizer.encode(coded)
  counts = token_bytes(tokenizer, coded, ids)
  return {
    "caseops": coded,
    "ids": ids.tolist(),
    "bytes": counts.tolist(),
    "utf8_bytes": len(text.encode()),
    "sum_bytes": int(counts.sum()),
  }


def _find_tokenizer(case: Case) -> Path:
  name = case.about["tokenizer"]
  places = [case.folder / name, case.folder.parent.parent / "tokenizers" / name]
  for path in places:
    if path.exists():
      return path
  raise UserError(f"The tokenizer {name} is neither at {places[0]} nor at {places[1]}; name it with --tokenizer.")

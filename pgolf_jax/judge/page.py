"""The verdict on a submission: one page of Markdown, and a few lines for the terminal."""

import datetime

from pgolf_jax.errors import checks_table
from pgolf_jax.judge import CANNOT_PROVE, REQUIRED, Judgement
from pgolf_jax.judge.child import network_isolation

_WORDS = {True: "holds", False: "**BROKEN**", None: "not proved"}


def headline(judgement: Judgement) -> str:
  """Returns the verdict in one line."""
  if judgement.is_proved:
    return f"PROVED: {judgement.bpb:.5f} bits per byte; every rule about the score holds."
  if judgement.broken:
    return f"BROKEN: {', '.join(dict.fromkeys(check.name for check in judgement.broken))}."
  return f"NOT PROVED: {', '.join(judgement.unproved)}."


def terminal(judgement: Judgement) -> str:
  """Returns the checks, and the verdict below them."""
  return f"{checks_table(judgement.checks)}\n{headline(judgement)}"


def markdown(judgement: Judgement) -> str:
  """Returns the whole page."""
  now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
  parts = [
    f"# {judgement.submission.resolve().name}\n\n**{_escaped(headline(judgement))}**\n\nJudged {now} on "
    f"{_escaped(judgement.machine)}. The evaluator ran {_escaped(network_isolation())}.",
    "## Score, bytes, time\n\n" + _table(("", ""), _figures(judgement)),
    "## Checks\n\n" + _table(("outcome", "check", "proves", "evidence"), _checks(judgement)),
  ]
  if judgement.unproved:
    parts.append("## Not proved\n\n" + _bullets(f"{name}: {why}" for name, why in judgement.unproved.items()))
  parts.append("## What this page cannot prove\n\n" + _bullets(CANNOT_PROVE))
  return "\n\n".join(parts) + "\n"


def _figures(judgement: Judgement) -> list[tuple[str, str]]:
  sizes, seconds = judgement.sizes, judgement.seconds
  rows = [("bits per byte, added up by the judge", f"{judgement.bpb:.5f}")]
  rows += [(f"`{name}`", f"{size:,} bytes") for name, size in sizes.items()]
  rows += [("counted together", f"{sum(sizes.values()):,} bytes")]
  rows += [(f"seconds: {what}", f"{value:.1f}") for what, value in seconds.items()]
  return [*rows, ("packages imported", ", ".join(judgement.packages) or "none")]


def _checks(judgement: Judgement) -> list[tuple[str, ...]]:
  return [(_WORDS[c.passed], c.name, REQUIRED.get(c.name, ""), c.finding) for c in judgement.checks]


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
  line = lambda cells: "| " + " | ".join(cells) + " |"  # noqa: E731
  body = [line([cells[0], *map(_escaped, cells[1:])]) for cells in rows]
  return "\n".join([line(head), line(["---"] * len(head)), *body])


def _bullets(lines) -> str:
  return "\n".join(f"- {_escaped(line)}" for line in lines)


def _escaped(text: str) -> str:
  """Text of a submission must not become part of the page's form."""
  for mark in "\\`*_<>|[]#":
    text = text.replace(mark, f"\\{mark}")
  return " ".join(text.split())

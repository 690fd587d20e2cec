"""The verb `pgolf configs`: the configs that come with the package."""

import textwrap


def configs(name: str = "") -> None:
  """List the built-in configs with their hardware, time and score, or print one of them.

  Example: pgolf configs --name demo

  Args:
    name: a config to print whole, to start one of your own from.
  """
  from pgolf_jax.settings import builtin
  from pgolf_jax.tables import page_width

  if name:
    print(builtin.find(name).read_text(encoding="utf-8"), end="")
    return
  width = page_width()
  for one in map(builtin.describe, map(builtin.find, builtin.names())):
    print("\n".join(textwrap.wrap(f"{one.name}: {one.title}", width, subsequent_indent="  ")))
    for what in ("hardware", "time", "score", "command"):
      text = getattr(one, what) or "not given"
      print("\n".join(textwrap.wrap(f"  {what:<10}{text}", width, subsequent_indent=" " * 12, break_on_hyphens=False)))
    print()


COMMANDS = {"configs": {"": configs}}

import dataclasses
import functools
import math
import typing
from pathlib import Path

import hypothesis
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pgolf_jax.errors import UserError, shown
from pgolf_jax.settings import LengthStage, ScaleStage, Settings, builtin, check, reference
from pgolf_jax.settings.arguments import Overrides, Positional, call, with_config
from pgolf_jax.settings.fields import every_setting
from pgolf_jax.settings.load import (
  changed,
  check_env_names,
  departures,
  env_names,
  flattened,
  from_dict,
  from_env,
  from_toml,
  to_dict,
)
from pgolf_jax.settings.reference import option


def test_every_setting_survives_its_environment_name():
  texts = flat(to_dict(Settings()))
  for name, dotted in env_names().items():
    default = flattened(Settings())[dotted]
    unset = "0.5" if name == "TTT_SHORT_BETA2" else "1"
    text = {True: "1", False: "0"}.get(default, str(texts.get(dotted, unset)))
    value = flattened(from_env({name: text}))[dotted]
    assert value == (float(unset) if default is None else default), name


def flat(table: dict, before: str = "") -> dict:
  """Nested values by dotted name."""
  rows = {}
  for name, value in table.items():
    rows |= flat(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
  return rows


def test_files_may_name_settings_of_nested_sections_as_they_were_named_before():
  before = {"lora_rank": 4, "global_lr": 0.5, "short_score_first_steps": "100:8", "num_phases": 3, "weight_decay": 0.1}
  now = {
    "lora": {"rank": 4, "weight_decay": 0.1},
    "phase": {"lr": 0.5, "count": 3},
    "short": {"score_first_steps": "100:8"},
  }
  assert from_dict({"ttt": before}) == from_dict({"ttt": now}) != Settings()


def test_schedules_are_tuples_in_memory_and_text_in_files():
  settings = from_env(
    {"TRAIN_SEQ_SCHEDULE": "32@0.25,64@1", "TTT_EVAL_BATCHES": "5, 1", "MIDRUN_CAP_SCHEDULE": "0.5@0.9"}
  )
  assert settings.train.seq_schedule == (LengthStage(32, 0.25), LengthStage(64, 1.0))
  assert settings.ttt.eval_batches == (1, 5)
  assert to_dict(settings)["train"]["seq_schedule"] == "32@0.25,64@1"
  assert from_dict(to_dict(settings)) == settings


@pytest.mark.parametrize("text", ["32@0.3333333333,64@1", "32@0.1000001,64@0.1000002", "1048577@1e-05"])
def test_a_schedule_is_written_with_every_digit(text):
  settings = from_env({"TRAIN_SEQ_SCHEDULE": text})
  assert to_dict(settings)["train"]["seq_schedule"] == text
  assert from_dict(to_dict(settings)) == settings


def test_python_gives_schedules_as_tuples_of_their_stages_and_nothing_to_optional_settings_alone():
  settings = builtin.settings
  stages = (LengthStage(256, 0.5), LengthStage(512, 1.0))
  assert settings("demo", train__seq_schedule=stages) == settings("demo", train__seq_schedule="256@0.5,512@1")
  assert settings("demo", train__seq_schedule=(), ttt__eval_batches=(5, 1)).ttt.eval_batches == (1, 5)
  assert settings("demo", ttt__short__rank=None).ttt.short.rank is None
  for name, value, part in (
    ("seed", None, "seed=nothing must be a whole number"),
    ("data.caseops", None, "must be true or false"),
    ("train.seq_schedule", None, "must be a schedule"),
    ("train.iterations", (1, 2), "must be a whole number"),
    ("train.seq_schedule", ((256, 0.5), (512, 1.0)), "must be a schedule, LENGTH@PROGRESS"),
    ("train.seq_schedule", (1, 2), "must be a schedule, LENGTH@PROGRESS"),
    ("train.seq_schedule", (ScaleStage(256, 0.5),), "must be a schedule, LENGTH@PROGRESS"),
  ):
    with pytest.raises(UserError, match=part):
      settings("demo", **{name: value})


@pytest.mark.parametrize("order", [1, -1])
def test_a_setting_that_a_file_gives_under_both_of_its_names_is_refused(order):
  both = dict([("lora_rank", 40), ("lora", {"rank": 80})][::order])
  with pytest.raises(UserError, match=r"ttt\.lora\.rank.* which is set already"):
    from_dict({"ttt": both})


def test_settings_change_by_dotted_name():
  settings = changed(Settings(), {"ttt.lora.rank": 4, "train.seq_schedule": "8@1", "ttt.lora.q": None})
  assert (settings.ttt.lora.rank, settings.train.seq_schedule) == (4, (LengthStage(8, 1.0),))
  with pytest.raises(UserError, match=r"did you mean ttt\.lora\.rank"):
    changed(Settings(), {"ttt.lora.rnk": 4})


def test_departures_from_the_record_are_named():
  settings = changed(Settings(), {"train.micro_batches": 64, "seed": 3, "data.path": "here"})
  assert departures(settings) == ["train.micro_batches=64 (8)"]
  assert departures(Settings()) == []


def test_defaults_are_the_record():
  record = from_toml("configs/record_8xh100.toml")
  assert dataclasses.replace(record, ttt=Settings().ttt, data=Settings().data, seed=Settings().seed) == Settings()


@pytest.mark.parametrize("config", ["demo", "record_8xh100", "record_1xgpu", "v5e_8"])
def test_configs_are_valid_and_survive_being_written(config):
  settings = from_toml(f"configs/{config}.toml")
  check.check(settings)
  assert from_dict(to_dict(settings)) == settings


def test_a_text_of_numbers_keeps_its_type():
  settings = from_env({"ITERATIONS": "7", "MIN_LR": "1", "SKIP_GATES_ENABLED": "0", "TTT_Q_LORA": ""})
  assert (settings.train.iterations, settings.optimizer, settings.model.skip_gates) == (7, Settings().optimizer, False)
  assert settings.train.min_lr == 1.0 and isinstance(settings.train.min_lr, float)
  assert settings.ttt.lora.q is None and not settings.ttt.lora.adapts_q


@pytest.mark.parametrize(
  "environ, part",
  [
    ({"ITERATIONS": "many"}, "ITERATIONS"),
    ({"WITHIN_BOOST": "0.7"}, "breaks causality"),
    ({"WORD_BOOST": "1"}, "breaks causality"),
    ({"ROPE_YARN": "1"}, "never rescaled"),
    ({"TTT_MASK": "no_vq"}, "no_qv"),
  ],
)
def test_what_is_not_supported_is_refused_with_the_reason(environ, part):
  with pytest.raises(UserError, match=part):
    from_env(environ)


def test_off_values_of_what_is_not_built_are_accepted():
  from_env({"WITHIN_BOOST": "0.0", "AGREE_ADD_BOOST": "0", "WORD_ORDER": "4", "COMPRESSOR": "pergroup"})


@pytest.mark.parametrize(
  "table, part",
  [
    ({"modle": {}}, "did you mean model"),
    ({"model": {"num_layer": 3}}, "did you mean model.num_layers"),
    ({"model": {"num_layers": "3"}}, "whole number"),
    ({"model": {"num_layers": True}}, "whole number"),
    ({"optimizer": {"clip_scope": "ranks"}}, "clip_scope=ranks must be one of rank, global; did you mean rank"),
    ({"train": 3}, "is a section"),
  ],
)
def test_a_wrong_config_names_the_nearest_valid_choice(table, part):
  with pytest.raises(UserError, match=part):
    from_dict(table)


def test_misspelt_environment_names():
  with pytest.raises(UserError, match="did you mean TTT_LORA_RANK"):
    check_env_names(["TTT_LORA_RNK"])
  check_env_names(["TTT_LORA_RANK", "WITHIN_TAU"])


@pytest.mark.parametrize(
  "changes, part",
  [
    ({"train.seq_schedule": "1000@1.0"}, "must divide the micro-batch of 98304"),
    ({"train.batch_tokens": 786433}, "multiple of train.micro_batches"),
    ({"train.seq_schedule": "1024"}, "LENGTH@PROGRESS"),
    ({"ttt.short.score_first_steps": "256"}, "256:16"),
    ({"ttt.eval_batches": "1,x"}, "whole number"),
    ({"train.max_wallclock_seconds": 4.0}, "must exceed quantize.reserve_seconds=4.0"),
    ({"train.max_wallclock_seconds": 3.0, "train.schedule_mode": "step"}, "must exceed quantize.reserve_seconds=4.0"),
    ({"model.num_heads": 7}, "must divide model.model_dim=512; 8 does"),
    ({"model.num_kv_heads": 3}, "must divide model.num_heads"),
    ({"model.loop_end": 11}, "layers from 0 to 10"),
    ({"model.rope_dims": 66}, "head width 64"),
    ({"model.leaky_relu_sq_slope": 0.0}, "above 0 and at most 1"),
    ({"eval.batch_tokens": 8192}, "fewer than eval.seq_len"),
    ({"eval.micro_batches": 0}, "must be from 1 to"),
    ({"hints.order": 0}, "hints.order"),
    ({"hints.order": 33}, "hints.order"),
    ({"ttt.lora.grad_steps": -1}, "must be from 0 to 1,000"),
    ({"ttt.short.score_first_steps": "", "ttt.short.chunk_size": 4096}, "hold a chunk of 4096"),
  ],
)
def test_impossible_combinations_are_refused(changes, part):
  with pytest.raises(UserError, match=part):
    check.check(changed(Settings(), changes))


def test_devices_must_fit_the_ranks():
  with pytest.raises(UserError, match="number of ranks, 3, must divide train"):
    check.check(Settings(), device_count=3)
  ranks = dataclasses.replace(Settings(), train=dataclasses.replace(Settings().train, world_size=2))
  with pytest.raises(UserError, match="clip_scope=global"):
    check.check(ranks, device_count=8)


@pytest.mark.parametrize(
  "changes, part",
  [
    *(({f"quantize.{name}": bits}, "must be from 2 to 8") for name in ("matrix_bits", "embed_bits") for bits in (1, 9)),
    ({"quantize.awq_bits": 16}, "must be from 2 to 8"),
    ({"quantize.lqer_factor_bits": 0}, "must be from 2 to 8"),
    ({"quantize.block_size": 0}, "block_size=0 must be from 1 to"),
    ({"quantize.awq_group_size": 0}, "awq_group_size=0 must be from 1 to"),
    ({"quantize.lqer_asym_group": 0}, "lqer_asym_group=0 must be from 1 to"),
    ({"ttt.chunk_size": 0}, "chunk_size=0 must be 1 or more"),
    ({"eval.seq_len": 0}, "eval.seq_len=0 must be 1 or more"),
    ({"train.batch_tokens": 1 << 40}, "batch_tokens=1099511627776 must be "),
    ({"model.num_layers": 10**9}, "num_layers=1000000000 must be from 1 to 1,000"),
    ({"model.model_dim": 2**16, "model.vocab_size": 2**16}, "at most 268435456 parameters"),
    ({"model.num_loops": 10**9}, "num_loops=1000000000 must be "),
    ({"seed": -1}, "seed=-1 must be "),
    ({"model.parallel_start_layer": 4}, r"inside the loop.*at least model.loop_end \+ 1 = 6"),
    ({"ttt.seq_len": 32}, "ttt.seq_len=32 must hold a chunk of 64"),
  ],
)
def test_values_out_of_range_are_refused(changes, part):
  with pytest.raises(UserError, match=part):
    check.check(changed(Settings(), changes))


FLOATS = [name for name, value in flattened(Settings()).items() if isinstance(value, float)]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_no_setting_is_infinite_or_no_number(number, tmp_path):
  for name in FLOATS:
    with pytest.raises(UserError, match=f"{name} must be finite"):
      changed(Settings(), {name: number})
  with pytest.raises(UserError, match="TTT_LORA_LR must be finite"):
    from_env({"TTT_LORA_LR": str(number)})
  with pytest.raises(UserError, match="MIDRUN_CAP_SCHEDULE must be finite"):
    from_env({"MIDRUN_CAP_SCHEDULE": f"{number}@0.5"})
  path = tmp_path / "config.toml"
  path.write_text(f"[model]\nrope_base = {number}\n")
  with pytest.raises(UserError, match=r"config.toml: model.rope_base must be finite"):
    from_toml(path)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("seed = 1\nx = " + "[" * 50_000, "line 2: arrays or tables nested too deeply"),
    ("seed = 1\n\nx = " + "{a=" * 50_000, "line 3: arrays or tables nested too deeply"),
    ("seed =\n", "line 1"),
    ("# text\nseed = " + "9" * 5000, "line 2: a number of hundreds of digits"),
    ("seed = " + "9" * 400, "seed=9+… must be "),
    ("[model]\nrope_base = " + "9" * 400, "rope_base=9+… must be a number"),
    ("a" * 100_000 + " = 1", "unknown section or setting"),
    ("seed = [1]", "seed=a list must be a whole number"),
    ('[model]\nparallel_final_lane = ["mean"]', "must be one of"),
  ],
)
def test_extreme_toml_is_one_sentence_with_file_and_line(tmp_path, text, message):
  path = tmp_path / "config.toml"
  path.write_text(text)
  with pytest.raises(UserError, match=message):
    check.check(from_toml(path))


ENTRIES = list(every_setting(Settings))


def numbers(entry):
  """The ranges of a setting's numbers, and what types these have."""
  kind = next((k for k in (typing.get_args(entry.kind) or [entry.kind]) if k is not type(None)), None)
  if typing.get_origin(entry.kind) is tuple:
    kinds = typing.get_type_hints(kind).values() if hasattr(kind, "_fields") else [kind]
    return list(zip(entry.within, kinds, strict=True))
  return [(entry.within, kind)] if kind in (int, float) else []


def test_every_number_has_a_range_that_holds_its_default():
  for entry in ENTRIES:
    assert entry.meaning and entry.meaning[-1] != ".", entry.name
    ranges = numbers(entry)
    assert (entry.within is not None) == bool(ranges), entry.name
    stages = entry.default if isinstance(entry.default, tuple) else [entry.default]
    for stage in [] if entry.default is None else stages:
      for (within, _), number in zip(ranges, stage if isinstance(stage, tuple) else [stage], strict=bool(ranges)):
        assert within.holds(number), entry.name
  assert len({entry.meaning for entry in ENTRIES}) == len(ENTRIES)


NUMBERS = [entry for entry in ENTRIES if numbers(entry) and typing.get_origin(entry.kind) is not tuple]


@hypothesis.settings(deadline=None)
@given(st.sampled_from(NUMBERS), st.integers(0, 10**12), st.booleans(), st.floats(0, 1e12))
def test_what_lies_outside_of_a_range_is_refused_everywhere_with_setting_value_and_range(entry, away, is_below, more):
  [(within, kind)] = numbers(entry)
  edge = within.low if is_below else within.high
  beyond = (away + 1 if kind is int else max(more, 1e-6) * max(1.0, abs(edge))) * (-1 if is_below else 1)
  value = kind(edge + beyond)
  assume(not within.holds(value) and math.isfinite(value))
  found = f"={shown(value)} must be {within}."
  with pytest.raises(UserError) as refused:
    changed(Settings(), {entry.name: value})
  assert str(refused.value) == entry.name + found
  *above, last = entry.path
  with pytest.raises(UserError) as refused:
    from_dict(functools.reduce(lambda table, name: {name: table}, reversed(above), {last: value}), where="some.toml")
  assert str(refused.value) == f"some.toml: {entry.name}{found}"
  if entry.env:
    with pytest.raises(UserError) as refused:
      from_env({entry.env: repr(value)})
    assert str(refused.value) == entry.env + found
  with pytest.raises(UserError) as refused:
    call("pgolf x", with_config(takes_settings, optional=True), [option(entry), repr(value)])
  assert str(refused.value) == option(entry) + found
  with pytest.raises(UserError) as refused:
    check.check(replaced(Settings(), entry.path, value))
  assert str(refused.value) == entry.name + found


def takes_settings(config: Positional[Path | None] = None, settings: Overrides = Settings()):
  return settings


def replaced(section, path, value):
  """Settings made in Python, which nothing has checked."""
  if len(path) > 1:
    value = replaced(getattr(section, path[0]), path[1:], value)
  return dataclasses.replace(section, **{path[0]: value})


@pytest.mark.parametrize(
  "name, text, part",
  [
    ("TRAIN_SEQ_SCHEDULE", "3072@1,1024@0.1", "goes backwards; in order it is 1024@0.1,3072@1"),
    ("MIDRUN_CAP_SCHEDULE", "0.5@0.9,1@0.1", "goes backwards; in order it is 1@0.1,0.5@0.9"),
    ("TTT_SHORT_SCORE_FIRST_STEPS", "2000:32,256:16", "goes backwards; in order it is 256:16,2000:32"),
    ("TRAIN_SEQ_SCHEDULE", "1024@0.5,2048@0.5", "two stages at the same place"),
    ("TRAIN_SEQ_SCHEDULE", "1024@1.5", "1.5 must be above 0 and at most 1"),
    ("TRAIN_SEQ_SCHEDULE", "0@1", "0 must be 1 or more"),
    ("MIDRUN_CAP_SCHEDULE", "-1@0.5", "-1.0 must be from 0 to 1,000"),
  ],
)
def test_schedules_that_mean_nothing_are_refused(name, text, part):
  with pytest.raises(UserError, match=part):
    from_env({name: text})
  dotted = env_names()[name]
  with pytest.raises(UserError, match=part):
    changed(Settings(), {dotted: text})


def test_a_schedule_made_in_python_is_checked_too():
  train = dataclasses.replace(Settings().train, seq_schedule=(LengthStage(64, 1.0), LengthStage(32, 0.5)))
  with pytest.raises(UserError, match="goes backwards"):
    check.check(dataclasses.replace(Settings(), train=train))


def test_the_page_of_settings_is_the_one_in_docs():
  page = Path(__file__).parents[1] / "docs/settings.md"
  assert page.read_text(encoding="utf-8") == reference.page(), "pgolf help settings --markdown > docs/settings.md"


def test_messages_show_values_without_pythons_quotes():
  assert [shown(value) for value in ("a", "", "a b", True, None, [1], {}, 1.5, "x" * 200)] == [
    "a", '""', '"a b"', "true", "nothing", "a list", "a table", "1.5", "x" * 100 + "…",
  ]  # fmt: skip

import dataclasses

import pytest

from pgolf_jax.errors import UserError
from pgolf_jax.settings import check
from pgolf_jax.settings.config import Settings, check_env_names, env_names


def test_every_setting_survives_its_environment_name():
  for name, dotted in env_names().items():
    section, _, field = dotted.rpartition(".")
    default = getattr(getattr(Settings(), section) if section else Settings(), field)
    text = {True: "1", False: "0", None: "1"}.get(default, str(default)) if not isinstance(default, str) else default
    found = Settings.from_env({name: text})
    value = getattr(getattr(found, section) if section else found, field)
    assert value == (True if default is None else default), name


def test_defaults_are_the_record():
  record = Settings.from_toml("configs/record_8xh100.toml")
  assert dataclasses.replace(record, ttt=Settings().ttt, data=Settings().data, seed=Settings().seed) == Settings()


@pytest.mark.parametrize("config", ["demo", "record_8xh100", "record_1xgpu"])
def test_configs_are_valid_and_survive_being_written(config):
  settings = Settings.from_toml(f"configs/{config}.toml")
  check.check(settings)
  assert Settings.from_dict(settings.to_dict()) == settings


def test_a_text_of_numbers_keeps_its_type():
  found = Settings.from_env({"ITERATIONS": "7", "MIN_LR": "1", "SKIP_GATES_ENABLED": "0", "TTT_Q_LORA": ""})
  assert (found.train.iterations, found.optimizer, found.model.skip_gates) == (7, Settings().optimizer, False)
  assert found.train.min_lr == 1.0 and isinstance(found.train.min_lr, float)
  assert found.ttt.q_lora is None and not found.ttt.adapts_q


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
    Settings.from_env(environ)


def test_off_values_of_what_is_not_built_are_accepted():
  Settings.from_env({"WITHIN_BOOST": "0.0", "AGREE_ADD_BOOST": "0", "WORD_ORDER": "4", "COMPRESSOR": "pergroup"})


@pytest.mark.parametrize(
  "table, part",
  [
    ({"modle": {}}, "did you mean model"),
    ({"model": {"num_layer": 3}}, "did you mean num_layers"),
    ({"model": {"num_layers": "3"}}, "whole number"),
    ({"model": {"num_layers": True}}, "whole number"),
    ({"optimizer": {"clip_scope": "ranks"}}, "did you mean 'rank'"),
    ({"train": 3}, "is a section"),
  ],
)
def test_a_wrong_config_names_the_nearest_valid_choice(table, part):
  with pytest.raises(UserError, match=part):
    Settings.from_dict(table)


def test_misspelt_environment_names():
  with pytest.raises(UserError, match="did you mean TTT_LORA_RANK"):
    check_env_names(["TTT_LORA_RNK"])
  check_env_names(["TTT_LORA_RANK", "WITHIN_TAU"])


@pytest.mark.parametrize(
  "section, changes, part",
  [
    ("train", {"seq_schedule": "1000@1.0"}, "must divide the micro-batch of 98304"),
    ("train", {"batch_tokens": 786433}, "multiple of train.micro_batches"),
    ("train", {"seq_schedule": "1024"}, "value@progress"),
    ("model", {"num_heads": 7}, "must divide model.model_dim=512; 8 does"),
    ("model", {"num_kv_heads": 3}, "must divide model.num_heads"),
    ("model", {"loop_end": 11}, "layers from 0 to 10"),
    ("model", {"rope_dims": 66}, "head width 64"),
    ("model", {"leaky_relu_sq_slope": 0.0}, r"\(0, 1\]"),
    ("eval", {"batch_tokens": 8192}, "fewer than eval.seq_len"),
    ("hints", {"order": 0}, "hints.order"),
    ("hints", {"order": 33}, "hints.order"),
    ("ttt", {"grad_steps": -1}, "0 scores without learning"),
    ("ttt", {"short_score_first_steps": "", "short_chunk_size": 4096}, "hold a chunk of 4096"),
  ],
)
def test_impossible_combinations_are_refused(section, changes, part):
  settings = Settings()
  settings = dataclasses.replace(settings, **{section: dataclasses.replace(getattr(settings, section), **changes)})
  with pytest.raises(UserError, match=part):
    check.check(settings)


def test_devices_must_fit_the_ranks():
  with pytest.raises(UserError, match="number of ranks, 3, must divide train"):
    check.check(Settings(), device_count=3)
  ranks = dataclasses.replace(Settings(), train=dataclasses.replace(Settings().train, world_size=2))
  with pytest.raises(UserError, match="clip_scope='global'"):
    check.check(ranks, device_count=8)

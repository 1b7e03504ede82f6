"""Presets: settings of a published variant where the config sets none."""

from __future__ import annotations

import pytest

from afmrl_ray.config import load_config
from afmrl_ray.config.load import with_values
from afmrl_ray.config.rar_presets import PRESETS, preset_keys
from afmrl_ray.errors import ConfigError


def value(config, key: str):
    for name in key.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_preset_changes_exactly_its_settings_however_it_is_chosen(preset):
    chosen, plain = load_config(None, [f"rar.preset={preset}"]), load_config()
    for key in preset_keys(preset):
        section, _, field = key.rpartition(".")
        wanted = PRESETS[preset][section][field] if section else PRESETS[preset][field]
        assert value(chosen.rar, key) == wanted
    same = {"preset": None, "grpo": plain.rar.grpo, **{k: value(plain.rar, k) for k in PRESETS[preset] if k != "grpo"}}
    assert chosen.rar.model_copy(update=same) == plain.rar
    assert with_values(plain, {"rar.preset": preset}) == chosen
    assert with_values(chosen, {"run.name": "again"}).rar == chosen.rar


def test_what_the_config_sets_is_stronger_than_a_preset():
    rar = load_config(None, ["rar.preset=dapo", "rar.epsilon_high=0.5", "rar.grpo.exclude_zero_variance=false"]).rar
    assert (rar.epsilon_high, rar.grpo.exclude_zero_variance, rar.kl_coef) == (0.5, False, 0.0)
    changed = with_values(load_config(), {"rar.preset": "dapo", "rar.epsilon_high": 0.5}).rar
    assert (changed.epsilon_high, changed.dynamic_sampling_rounds) == (0.5, 3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rar.preset=ppo"], "rar.preset"),
        (["rar.updates_per_batch=3", "rar.passes_per_batch=2"], "use a multiple, since every pass"),
        (["rar.updates_per_batch=3"], "3 mini-batches"),
        (["rar.grpo.exclude_zero_variance=true", "rar.grpo.kl_in_reward=true"], "use one of the two"),
        (["rar.gradient_cosine_every=5", "rar.zero_stage=3"], "set it to 0"),
    ],
)
def test_settings_that_contradict_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)

"""Which weights and factors ``launch.export`` is asked for, and settings that contradict."""

import re

import pytest

from longrope2.config import compose
from longrope2.errors import ConfigError
from longrope2.export.variants import ExportRoot, check
from longrope2.model.factors_source import RopeConfig
from longrope2.rope.methods import RopeMethod


def composed(*arguments):
    words = ["model=tiny", "target_len=2048", "run.name=r", *arguments]
    return compose(ExportRoot, "export", words)


def test_a_trained_model_has_no_rope_by_default():
    config = composed()
    check(config)
    assert config.export.trained and config.rope is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["rope=llama3"], RopeConfig(RopeMethod.llama3)),
        (["rope.method=yarn"], RopeConfig(RopeMethod.yarn)),
        (["rope.both_windows=true"], RopeConfig(RopeMethod.searched, both_windows=True)),
        (
            ["rope=from_file", "rope.factors=F.json"],
            RopeConfig(RopeMethod.from_file, factors="F.json"),
        ),
        ([], None),
    ],
)
def test_factors_without_a_training_are_chosen_by_group_or_by_key(words, expected):
    config = composed("export.trained=false", *words)
    check(config)
    assert config.rope == expected


@pytest.mark.parametrize(
    ("words", "faults"),
    [
        (
            ["rope=yarn"],
            [
                "rope.method=yarn is given, but a trained model has the factors of its training; "
                "leave rope out, or set export.trained=false to export the base model's weights "
                "with it"
            ],
        ),
        (
            ["export.trained=false", "export.checkpoint=DIR", "model.from_scratch=true"],
            [
                "export.checkpoint=DIR is given with export.trained=false, which exports the "
                "weights of model.path; leave one of them out",
                "export.trained=false exports the weights of model.path; set "
                "model.from_scratch=false",
            ],
        ),
        (
            ["export.trained=false", "target_len=128", "export.cost_windows=-1"],
            [
                "export.cost_windows=-1 must be 0 or more",
                "target_len=128 must be a multiple of model.original_len=128, and at least twice "
                "that; use for example 256",
            ],
        ),
    ],
)
def test_settings_that_contradict_are_refused_together(words, faults):
    with pytest.raises(ConfigError) as caught:
        check(composed(*words))
    assert caught.value.faults == tuple(faults)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("rope.metod=yarn", "rope.metod (did you mean rope.method?); keys beside it: method, "),
        ("rope.method=foo", "rope.method: Invalid value 'foo', expected one of [none, pi"),
        ("export.trained=perhaps", "export.trained: Value 'perhaps' is not a valid bool"),
    ],
)
def test_unreadable_settings_name_their_key(word, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        composed(word)

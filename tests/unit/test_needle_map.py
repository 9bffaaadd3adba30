"""The needle map: every depth and length, realised where it was asked for, solvable."""

import pytest
import ruler_fixtures as fixtures
from transformers import AutoTokenizer

from longrope2.errors import ConfigError, DataError
from longrope2.evaluation.needle_map import MapHaystack, NeedleMapConfig, needle_map_tasks


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained("models/tiny")


@pytest.mark.parametrize("haystack", list(MapHaystack))
def test_every_cell_has_its_samples_at_its_depth(tmp_path, tokenizer, haystack):
    depths = [0.0, 0.25, 0.5, 1.0]
    config = NeedleMapConfig(depths=depths, repeats=3, haystack=haystack)
    texts = fixtures.essays() if haystack is MapHaystack.essay else []
    tasks = needle_map_tasks(config, tokenizer, texts, [512, 4096], cache_folder=tmp_path)
    assert [(task.suite, task.name, task.length) for task in tasks] == [
        ("needle_map", "needle_map", 512),
        ("needle_map", "needle_map", 4096),
    ]
    for task in tasks:
        cells = [
            (sample.facts["requested_depth"], sample.facts["repeat"]) for sample in task.samples
        ]
        assert cells == [(depth, repeat) for repeat in range(3) for depth in depths]
        assert len({sample.answers for sample in task.samples}) == 12
        line = 40 / task.length
        for sample in task.samples:
            assert abs(sample.facts["depth"] - sample.facts["requested_depth"]) <= line
            total = len(sample.prompt_T) + sample.max_new_tokens
            assert 0.93 * task.length <= total <= task.length
            text = fixtures.prompt_text(tokenizer, sample)
            assert (
                task.score(sample, fixtures.needle_oracle(text)) == 1.0
                and task.score(sample, "") == 0.0
            )
            head, tail = text.index("Text:") + 6, text.index(" (End of the text.)")
            needle = text.index("One of the special")
            if sample.facts["requested_depth"] == 0.0:
                assert needle <= head + 1
            if sample.facts["requested_depth"] == 1.0:
                assert tail - needle < 120


def test_a_repeat_is_the_same_whatever_else_is_asked_for(tmp_path, tokenizer):
    def cells(depths, repeats):
        config = NeedleMapConfig(depths=depths, repeats=repeats, haystack=MapHaystack.noise)
        (task,) = needle_map_tasks(config, tokenizer, [], [512], cache_folder=tmp_path)
        return {(s.facts["requested_depth"], s.facts["repeat"]): s.sha256 for s in task.samples}

    few, many = cells([0.5], 2), cells([0.0, 0.5, 1.0], 4)
    assert few == {cell: sha for cell, sha in many.items() if cell in few}


def test_bad_settings_are_named_at_once(tmp_path, tokenizer):
    config = NeedleMapConfig(depths=[0.5, 1.5], repeats=0)
    with pytest.raises(ConfigError) as error:
        needle_map_tasks(config, tokenizer, [], [], cache_folder=tmp_path)
    for words in (
        "needle_map.depths=[0.5, 1.5] must be",
        "needle_map.repeats=0 must",
        "lengths=[] must",
    ):
        assert words in str(error.value)


def test_missing_texts_and_short_lengths_are_refused(tmp_path, tokenizer):
    with pytest.raises(DataError, match="the haystack holds no words"):
        needle_map_tasks(NeedleMapConfig(), tokenizer, [], [512], cache_folder=tmp_path)
    config = NeedleMapConfig(haystack=MapHaystack.noise)
    with pytest.raises(
        DataError, match="needle_map at 64 tokens: the length is too short for needles"
    ):
        needle_map_tasks(config, tokenizer, [], [64], cache_folder=tmp_path)

"""RULER's templates for chat models: which one, and control tokens in the template alone."""

import pytest
import ruler_fixtures as fixtures
from tokenizers import AddedToken

from longrope2.errors import ConfigError, DataError
from longrope2.evaluation.prompts import PromptEncoder
from longrope2.evaluation.ruler.config import RulerConfig, RulerMode, ruler_faults
from longrope2.evaluation.ruler.template import PromptTemplate, choose_template
from longrope2.evaluation.ruler.upstream import UpstreamRuler

CHAT = (
    "{% for message in messages %}<|turn|>{{ message['role'] }}\n{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
TEMPLATES = {
    "base": "{task_template}",
    "bracketed": "[INST] {task_template} [/INST]",
    "half": "<|turn|>user\n{task_template}",
    "turns": "<|turn|>user\n{task_template}<|end|><|turn|>assistant\n",
    "plain": "USER: {task_template} ASSISTANT:",
    "foreign": "<|turn|>user\n{task_template}<|other|>",
}


@pytest.fixture(scope="module")
def tokenizer():
    found = fixtures.byte_level(fixtures.GPT2_SPLIT)
    found.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<|turn|>"), AddedToken("<|end|>")]}
    )
    found.chat_template = CHAT
    return found


@pytest.fixture
def checkout(tmp_path):
    """RULER's layout with templates and prompts of our own."""
    data = tmp_path / "scripts" / "data"
    (data / "synthetic" / "json").mkdir(parents=True)
    (data / "template.py").write_text(f"Templates = {TEMPLATES!r}\nraise SystemExit\n")
    return tmp_path


def config(checkout, **changes):
    return RulerConfig(
        RulerMode.upstream, upstream_checkout=str(checkout), num_samples=2, **changes
    )


def test_rulers_template_with_the_models_control_tokens_is_chosen(checkout, tokenizer):
    found = choose_template(config(checkout), tokenizer)
    assert (found.name, found.head, found.tail) == (
        "turns",
        "<|turn|>user\n",
        "<|end|><|turn|>assistant\n",
    )
    assert found.label == "RULER's turns chat template"
    assert set(found.control_ids) == {"<|turn|>", "<|end|>"}


def test_a_base_model_is_asked_bare(checkout):
    bare = fixtures.byte_level(fixtures.GPT2_SPLIT)
    found = choose_template(config(checkout), bare)
    assert found == PromptTemplate("base") and found.label == "no chat template"
    assert found.pieces("<|turn|> as it stands") == ["<|turn|> as it stands"]


def test_a_model_that_ruler_has_none_for_is_asked_inside_its_own(checkout, tokenizer):
    path = checkout / "scripts/data/template.py"
    path.write_text("Templates = {'base': '{task_template}', 'other': '<x>{task_template}</x>'}")
    found = choose_template(config(checkout), tokenizer)
    assert (found.name, found.label) == ("own", "the model's own chat template")
    assert (found.head, found.tail) == ("<|turn|>user\n", "<|end|><|turn|>assistant\n")


@pytest.mark.parametrize("name", ["base", "bracketed", "plain"])
def test_a_template_that_is_named_is_taken(checkout, tokenizer, name):
    found = choose_template(config(checkout, template=name), tokenizer)
    assert found.around("X") == TEMPLATES[name].format(task_template="X")


def test_templates_that_do_not_exist_are_named(checkout, tokenizer):
    with pytest.raises(ConfigError, match="suite.ruler.template=no is no template .*use base, br"):
        choose_template(config(checkout, template="no"), tokenizer)
    fault = "suite.ruler.template=own is for mode=upstream; mode=fixed asks without: set it to null"
    settings = RulerConfig(tasks=["vt"], template="own")
    assert ruler_faults(settings, [4096], "suite.ruler") == [fault]
    (checkout / "scripts/data/template.py").write_text("Templates = {'base': 'x'}")
    with pytest.raises(DataError, match="the template base holds no {task_template}"):
        choose_template(config(checkout), tokenizer)
    (checkout / "scripts/data/template.py").unlink()
    with pytest.raises(DataError, match="holds no scripts/data/template.py; give a checkout"):
        choose_template(config(checkout), tokenizer)
    tokenizer = fixtures.byte_level(fixtures.GPT2_SPLIT)
    tokenizer.chat_template = "silent"
    with pytest.raises(DataError, match="drops what the user says; set suite.ruler.template=base"):
        choose_template(config(checkout), tokenizer)


def test_only_the_template_brings_control_tokens(checkout, tokenizer, monkeypatch):
    """Those of head and tail are the tokenizer's own; a document that says ``<|end|>`` is text."""
    prompts = {"niah": "Read {context} and say {query} {type_needle_v}."}
    monkeypatch.setattr(
        "longrope2.evaluation.ruler.upstream_draws.read_prompts",
        lambda _, around=str: {name: around(text) + " It is" for name, text in prompts.items()},
    )
    template = choose_template(config(checkout), tokenizer)
    ruler = UpstreamRuler(config(checkout), PromptEncoder(tokenizer), template)
    text = ruler.prompts["niah"].format(context="an <|end|> <s>", query="it", type_needle_v="now")
    turn, end = (tokenizer.convert_tokens_to_ids(name) for name in ("<|turn|>", "<|end|>"))
    ids = ruler._ids(text)
    assert [n for n in ids if n in (turn, end)] == [turn, end, turn]
    assert ids[0] == turn and tokenizer.decode(ids) == text
    official = tokenizer(text.replace("an <|end|> <s>", "an"), add_special_tokens=False)
    assert ruler._ids(text.replace("an <|end|> <s>", "an")) == official.input_ids
    bare = UpstreamRuler(config(checkout), PromptEncoder(tokenizer))
    identities = [r.recipe("fwe", 4096).identity for r in (ruler, bare)]
    assert identities[0].pop("template") == [template.head, template.tail]
    assert identities[0] == identities[1]


def test_bos_is_not_put_twice(checkout, tokenizer, monkeypatch):
    ruler = UpstreamRuler.__new__(UpstreamRuler)
    ruler.encoder = PromptEncoder(tokenizer)
    (bos,) = ruler.encoder.bos_ids
    for head, expected in (("<s>", 1), ("", 1)):
        ruler.template = PromptTemplate("named", head, "", {"<s>": bos} if head else {})
        monkeypatch.setattr(ruler, "texts", lambda *_, head=head: [(f"{head}text", ["a"], 9)])
        (sample,) = ruler._make("vt", 4096, 0, 1)
        assert sample.prompt_T.tolist().count(bos) == expected and sample.prompt_T[0] == bos

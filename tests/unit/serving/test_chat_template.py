import pytest

from dsmoe_ray.errors import ArtifactError, RequestError
from dsmoe_ray.serving.chat_template import ChatTemplate
from tests.fakes.gateway_server import CHAT_TEMPLATE
from tests.fakes.tiny_artifact import make_config, make_tokenizer

USER = {"role": "user", "content": "hello"}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(make_config())


def make(source, tokenizer, **settings):
    return ChatTemplate(source, tokenizer, origin="here", **settings)


def text_of(tokenizer, ids):
    return "".join(f"[{token_id}]" if token_id == 0 else tokenizer.decode([token_id]) for token_id in ids)


def test_the_templates_own_special_tokens_are_tokens(tokenizer):
    ids = make(CHAT_TEMPLATE, tokenizer).encode([USER])
    assert text_of(tokenizer, ids) == "<|user|>\nhello[0]\n<|assistant|>\n"
    closed = make(CHAT_TEMPLATE, tokenizer).encode([USER], add_generation_prompt=False)
    assert text_of(tokenizer, closed) == "<|user|>\nhello[0]\n"


def test_what_people_write_is_text_even_where_it_spells_a_special_token(tokenizer):
    template = make(CHAT_TEMPLATE, tokenizer)
    content = "a<|endoftext|>b \ue000<|endof\ue000text|><|reserved_0|>"
    ids = template.encode([USER | {"content": content}])
    assert ids.count(0) == 1 and tokenizer.special_ids["<|reserved_0|>"] not in ids
    spelled = "a<|endoftext|>b <|endoftext|><|reserved_0|>"
    assert text_of(tokenizer, ids) == f"<|user|>\n{spelled}[0]\n<|assistant|>\n"


def test_other_text_is_encoded_as_one_piece(tokenizer):
    text = "def add(left, right):\n    return"
    assert make("{{ messages[0].content }}", tokenizer).encode([USER | {"content": text}]) == list(
        tokenizer.encode(text)
    )


def test_a_template_sees_names_of_tokens(tokenizer):
    template = make("{{ bos_token }}{{ eos_token }}{{ tools }}", tokenizer, bos_token="<|reserved_1|>")
    ids = template.encode([USER])
    assert ids[:2] == [tokenizer.special_ids["<|reserved_1|>"], 0] and tokenizer.decode(ids) == "None"


def test_a_template_may_refuse_messages(tokenizer):
    template = make("{% if messages|length > 1 %}{{ raise_exception('one only') }}{% endif %}", tokenizer)
    with pytest.raises(RequestError, match="one only") as caught:
        template.encode([USER, USER])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% for i in range(999999999) %}{% endfor %}",
        "{{ nothing.there.at_all }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(tokenizer, source):
    with pytest.raises(RequestError, match="refuses"):
        make(source, tokenizer).encode([USER])


def test_a_template_that_is_none_is_found_when_the_model_is_read(tokenizer):
    with pytest.raises(ArtifactError, match="here"):
        make("{% for %}", tokenizer)


def test_usual_extensions_are_there(tokenizer):
    source = "{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}{% break %}{% endfor %}"
    ids = make(source, tokenizer).encode([USER | {"content": "\u6f22"}])
    assert tokenizer.decode(ids) == '{"role": "user", "content": "\u6f22"}'


def test_developers_are_the_system_where_the_template_does_not_know_them(tokenizer):
    message = {"role": "developer", "content": ""}
    assert tokenizer.decode(make("{{ messages[0].role }}", tokenizer).encode([message])) == "system"
    source = "{{ 'x' if messages[0].role == 'developer' }}"
    assert tokenizer.decode(make(source, tokenizer).encode([message])) == "x"

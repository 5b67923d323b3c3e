"""Chat templates. The expected texts are what `apply_chat_template` of transformers 5.24.0 makes of the same."""

import json

import pytest

from fp8x.errors import CheckpointError, DataError
from fp8x.models import apply_chat_template

# Qwen2's, as published.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# In the style of Llama 3, over several lines: blocks take their line breaks and indents with them.
LLAMA = """{% set loop_messages = messages %}
{% for message in loop_messages %}
    {% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim %}
    {% set content = content + '<|eot_id|>' %}
    {% if loop.index0 == 0 %}
        {% set content = bos_token + content %}
    {% endif %}
    {{- content }}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
# What others use: namespaces, loop controls, JSON, marks for training, the time, and variables that are not given.
FEATURES = """{%- set ns = namespace(count=0, last=none) %}
{%- if tools is not none %}{{ tools }}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' -%}
        {% generation %}{{ message.content }}{% endgeneration %}{% continue %}
    {%- endif %}
    {%- set ns.count = ns.count + 1 %}
    {%- set ns.last = dict(message, at=ns.count) %}
    {{- ns.last | tojson }}
    {{- eos_token }}[{{ pad_token }}]
{%- endfor %}
{{ strftime_now('%%') }}{{ documents is none }}
"""
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is 1 < 2 & 'é'?\n"},
    {"role": "assistant", "content": "Yes.", "tool_calls": None},
    {"role": "user", "content": "Why?"},
]


@pytest.fixture
def write(tmp_path):
    """Writes tokenizer_config.json; gives the directory."""

    def write(**config):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path

    return write


def test_chatml(write):
    path = write(chat_template=CHATML, bos_token=None)
    turns = (
        "<|im_start|>user\nIs 1 < 2 & 'é'?\n<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n"
    )
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n" + turns
    assert apply_chat_template(path, MESSAGES) == expected + "<|im_start|>assistant\n"
    assert apply_chat_template(path, MESSAGES, add_generation_prompt=False) == expected
    expected = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + turns
    assert apply_chat_template(path, MESSAGES[1:], add_generation_prompt=False) == expected


def test_llama(write):
    path = write(bos_token={"__type": "AddedToken", "content": "<|begin_of_text|>"}, eos_token="<|eot_id|>")
    (path / "chat_template.jinja").write_text(LLAMA)
    assert apply_chat_template(path, MESSAGES) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>\n"
        "<|start_header_id|>user<|end_header_id|>\n\nIs 1 < 2 & 'é'?<|eot_id|>\n"
        "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>\n"
        "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>\n"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_what_templates_may_use(write):
    path = write(
        chat_template=[{"name": "tool_use", "template": "no"}, {"name": "default", "template": FEATURES}],
        eos_token="</s>",
    )
    assert apply_chat_template(path, MESSAGES) == (
        '{"role": "system", "content": "Be brief.", "at": 1}</s>[]'
        '{"role": "user", "content": "Is 1 < 2 & \'é\'?\\n", "at": 2}</s>[]Yes.'
        '{"role": "user", "content": "Why?", "at": 3}</s>[]%True'
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ strftime_now.__globals__ }}",
        "{{ namespace.mro() }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace(__html__=1) %}",
        "{% set ns = namespace() %}{% set ns.__call__ = 1 %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_the_sandbox_holds(write, template):
    """What is out of reach is undefined, which is no text, or raises."""
    try:
        text = apply_chat_template(write(chat_template=template), MESSAGES)
    except CheckpointError as error:
        assert "its chat template fails on these messages" in str(error)
    else:
        assert text == ""


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "has no chat template, neither chat_template.jinja nor chat_template in tokenizer_config.json; copy"),
        ({"chat_template": [{"name": "rag", "template": ""}]}, r"has chat templates \['rag'\], but none is named 'def"),
        ({"chat_template": "{{ raise_exception('no system') }}"}, "config.json: its chat template fails on .*: no sys"),
        ({"chat_template": "{% if %}"}, "its chat template fails on these messages: Expected an expression"),
        ({"chat_template": "{{ 'a' + none }}"}, "its chat template fails on these messages: can only concatenate"),
    ],
)
def test_templates_that_fail(write, config, message):
    with pytest.raises(CheckpointError, match=message):
        apply_chat_template(write(**config), MESSAGES)


def test_a_broken_config(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: is no JSON"):
        apply_chat_template(tmp_path, MESSAGES)


@pytest.mark.parametrize("messages", [[], "text", [{"content": print}], 5])
def test_messages_that_do_not_fit(write, messages):
    with pytest.raises(DataError, match="messages: "):
        apply_chat_template(write(chat_template=CHATML), messages)

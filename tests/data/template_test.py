"""Chat templates: the text of transformers, no clock, and always an end."""

import datetime
import pathlib

import pytest
from transformers import PreTrainedTokenizerFast

from tiltjax.data import template as lib
from tiltjax.data import text
from tiltjax.data.chat import open_turn, render
from tiltjax.data.template import TODAY, render_template

CASES = pathlib.Path(__file__).parents[1] / "cases"
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}}
]
TALK = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": "Weather in <Oslo> & \"Røros\"?"},
    {"role": "assistant", "content": "", "reasoning_content": "ask", "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Røros", "days": [1, 2]}}}]},
    {"role": "tool", "content": "rain\n"},
    {"role": "user", "content": "  And now? "},
]  # fmt: skip
TEMPLATES = {
    "namespaces": """{%- set ns = namespace(last=0, seen=[]) %}{% for m in messages %}
{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{{ bos_token }}{{ ns.last }}{{ messages[ns.last:] | length }}""",
    "blanks": """
  {% for m in messages %}
  {{ loop.index }}/{{ loop.length }} {{ m['role'] }}
    {%- if m.tool_calls %}
  {{- m.tool_calls[0].function | tojson(indent=2) }}
  {% endif %}
  {% endfor %}
""",
    "macros": """{% macro line(m, n) -%}[{{ m.role ~ ':' ~ n }}|{{ m.content | trim | upper }}]{%- endmacro %}
{% for m in messages if m.role != 'tool' %}{{ line(m, loop.index * 2) }}{% else %}none{% endfor %}""",
    "tools": """{% if tools is not none %}{{ tools | tojson }}
{% for t in tools %}{{ t.function.parameters.properties.items() | list }}{% endfor %}{% endif %}
{{ enable_thinking | default('unset') }}""",
    "loops": """{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}
{% if loop.last %}{% break %}{% endif %}{% generation %}{{ m.content }}{{ m.thinking }}{% endgeneration %}
{{ m.reasoning_content or '-' }}{% endfor %}""",
    "methods": """{% for m in messages %}{{ m.content.strip().split(' ')[0] + '%s' % loop.index0 }}
{{ '{:>3}'.format(1) }}{{ ('ab' * 2) | replace('a', 'c') }}{{ 7 % 4 }}{{ 2 ** 3 }}
{{ (m.content.split() + ['x']) | join('-') }}{% endfor %}{% set y %}
{{ messages | map(attribute='role') | unique | sort | join(',') }}{% endset %}{{ y | indent(2) | center(9) }}""",
    "generation": "{% for m in messages %}{{ m.role }}{% endfor %}{% if add_generation_prompt %}>{% endif %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("options", [{}, {"tools": TOOLS, "enable_thinking": False}])
def test_writes_what_transformers_writes(make_tokenizer, name, options):
    tokenizer: PreTrainedTokenizerFast = make_tokenizer(chat_template=TEMPLATES[name])
    for begins in (False, True):
        expected = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=begins, **options)
        assert render(tokenizer, TALK, "x", options, add_generation_prompt=begins) == expected


@pytest.mark.parametrize("case", ["policy", "tools-column/policy", "open-think-template/policy"])
def test_writes_what_transformers_writes_for_the_cases(case):
    tokenizer = text.load_tokenizer(CASES / case)
    for talk in (TALK, TALK[:2], [*TALK[:2], {"role": "assistant", "content": "It "}]):
        ends = talk[-1]["role"] == "assistant"
        options = {"continue_final_message": True} if ends else {"add_generation_prompt": True}
        assert open_turn(tokenizer, talk, "x") == tokenizer.apply_chat_template(talk, tokenize=False, **options)


def test_a_template_of_several_is_chosen_by_tools(make_tokenizer):
    tokenizer = make_tokenizer(chat_template={"default": "plain", "tool_use": "{{ tools[0].function.name }}"})
    assert (render(tokenizer, TALK, "x"), render(tokenizer, TALK, "x", {"tools": TOOLS})) == ("plain", "weather")


@pytest.mark.robustness("Text", given="a chat template that reads the clock", outcome="it is told one fixed date")
def test_a_template_never_reads_the_clock(make_tokenizer, monkeypatch):
    clock = make_tokenizer(chat_template="{{ strftime_now('%d %b %Y') }}{{ date_string }}")
    assert render(clock, TALK, "x", {"date_string": "!"}) == "26 Jul 2024!"
    print_ = text.tokenizer_fingerprint(clock)
    monkeypatch.setattr(text, "TODAY", TODAY + datetime.timedelta(days=1))
    assert text.tokenizer_fingerprint(clock) != print_


DOUBLING = "{{% set ns = namespace(x='x') %}}{{% for i in range(99) %}}{}{{% endfor %}}{{{{ ns.x }}}}"


@pytest.mark.robustness(
    "Text",
    given="a chat template that loops without end or writes gigabytes",
    outcome="refused in one line, in seconds",
)
@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{{ [0] * 10**10 }}",
        "{{ 2 ** 10000000000 }}",
        DOUBLING.format("{% set ns.x = ns.x + ns.x %}"),
        DOUBLING.format("{% set ns.x = ns.x ~ ns.x %}"),
        DOUBLING.format("{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
        DOUBLING.format("{% set ns.x = [ns.x, ns.x] | join %}"),
        "{% macro f(n) %}{% for i in [0, 1] %}{{ f(n - 1) if n else '' }}{% endfor %}{% endmacro %}{{ f(40) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'x' | center(10000000000) }}{{ 'x'.ljust(10000000000) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '{:>10000000000}'.format(1) }}",
        "{{ ('x' * 99999).replace('x', 'y' * 99999) }}",
        "{{ range(99999) | join('y' * 99999) }}",
        "{{ ('x\n' * 99999) | indent(99999) }}",
    ],
)
def test_a_template_without_end_is_refused(template, monkeypatch):
    monkeypatch.setattr(lib, "_MOST_WORK", 1 << 21)
    with pytest.raises(ValueError, match=r"loops without end|calls itself without end"):
        render_template(template, {"messages": TALK})


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "Expected an expression"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ raise_exception('user\nfirst') }}", "user first"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ namespace(__class__=1) }}", "no attribute '__class__'"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|undefined"),
        ("{{ nobody.home.now }}", "'nobody' is undefined"),
        ("{{ messages | dictsort }}", "'list' object has no attribute"),
        ("{% include 'x' %}", "no loader"),
    ],
)
def test_a_template_that_fails_says_why_in_one_line(template, message):
    with pytest.raises(ValueError, match=message) as info:
        render_template(template, {"messages": TALK})
    assert "\n" not in str(info.value)

"""Chat templates: Jinja that comes with a checkpoint, rendered in a sandbox that always ends.

A template writes the text that ``apply_chat_template`` of transformers writes, with two differences. It never reads the
clock: `TODAY` is the date that it is told, so that a run reads the same prompts tomorrow. And its work is bounded: a
template that loops without end, or writes without bound, is refused.
"""

import contextvars
import datetime
import functools
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tiltjax.data.notes import warn_once

_LOG = logging.getLogger(__name__)

__all__ = ["TODAY", "render_template"]

TODAY = datetime.datetime(2024, 7, 26)
"""What ``strftime_now`` of every template says. A row may give its own date in ``chat_template_kwargs``."""

_MOST_WORK = 1 << 26
"""Characters that one rendering may write, of the final text and of every text on the way to it."""

_WORK_OF_A_TURN = 512
"""What one turn of a loop, or one call of a macro, counts as, in characters."""

_WORK: contextvars.ContextVar[int] = contextvars.ContextVar("work")


def render_template(template: str, variables: Mapping[str, Any]) -> str:
    """The text that a template writes.

    Args:
      template: Jinja source.
      variables: What it may read: ``messages``, ``tools``, ``add_generation_prompt``, special tokens, and so on; plain
        JSON values.

    Returns:
      The text.

    Raises:
      ValueError: In one line, if the template is not valid, refuses what it is given, or works beyond the bound.
    """
    token = _WORK.set(0)
    try:
        return _compiled(template).render(variables)
    except RecursionError:
        raise ValueError("it calls itself without end") from None
    except Exception as error:  # A template is somebody's code: it may raise anything.
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
    finally:
        _WORK.reset(token)


def _spend(work: int) -> bool:
    done = _WORK.get(0) + work
    if done > _MOST_WORK:
        raise ValueError(f"it loops without end or writes more than {_MOST_WORK >> 20} MiB")
    _WORK.set(done)
    return True


def _concat(parts: Iterable[str]) -> str:
    written = []
    for part in parts:
        _spend(len(part) + 1)
        written.append(part)
    return "".join(written)


def _joined(*parts: Any) -> str:
    return _concat(map(str, parts))


def _spend_on_growth(name: str, subject: Any, arguments: tuple[Any, ...]) -> None:
    """Counts what the few operations write that make a long text of a short one, before they do."""
    numbers = [abs(value) for value in arguments if isinstance(value, int)]
    if name in ("center", "expandtabs", "ljust", "rjust", "zfill"):
        _spend(sum(numbers))
    elif name == "indent" and isinstance(subject, str):
        _spend((subject.count("\n") + 1) * sum(numbers))
    elif name == "replace" and isinstance(subject, str) and len(arguments) >= 2:
        old, new = str(arguments[0]), str(arguments[1])
        _spend((subject.count(old) if old else len(subject) + 1) * len(new))
    elif name == "join" and arguments:
        # The method joins its argument by the subject, the filter its subject by the argument.
        parts, glue = (arguments[0], subject) if isinstance(subject, str) else (subject, arguments[0])
        _spend(len(parts) * len(str(glue)) if hasattr(parts, "__len__") else 0)
    elif name in ("format", "format_map", "%"):
        digits = "".join(c if c.isdigit() else " " for c in str(subject)).split()
        _spend(sum(min(int(number), _MOST_WORK) for number in digits if len(number) < 10) + sum(numbers))
        if any(len(number) >= 10 for number in digits):
            _spend(_MOST_WORK + 1)


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _to_json(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=64)
def _compiled(template: str) -> Any:
    from jinja2.ext import loopcontrols

    environment = _environment_type()(trim_blocks=True, lstrip_blocks=True, extensions=[_generation(), loopcontrols])
    environment.filters = {name: _counted(name, function) for name, function in environment.filters.items()}
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": TODAY.strftime}
    if "strftime_now" in template:
        warn_once(_LOG, f"the chat template asks for the date: every prompt is told {TODAY:%d %b %Y}, on any day")
    environment.globals["namespace"] = _namespace_type()
    del environment.globals["lipsum"]
    return environment.from_string(template)


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    passes = hasattr(function, "jinja_pass_arg")

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        subject, *rest = arguments[1:] if passes else arguments
        _spend_on_growth(name, subject, (*rest, *options.values()))
        out = function(*arguments, **options)
        _spend(len(out) if isinstance(out, str | list) else 1)
        return out

    return call


@functools.cache
def _environment_type() -> type:
    """The sandbox, in a function so that Jinja is imported when the first template is."""
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    class Counting(NodeTransformer):
        """Puts the counting into the loops, macros and concatenations of a template."""

        def visit(self, node: Any) -> Any:
            node = self.generic_visit(node)
            if isinstance(node, nodes.Concat):
                call: Any = nodes.Call(nodes.EnvironmentAttribute("joined"), node.nodes, [], None, None)
                return call.set_lineno(node.lineno).set_environment(node.environment)
            if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock):
                node.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute("turn"), lineno=node.lineno))
            if isinstance(node, nodes.For) and node.test is not None:
                node.test = nodes.And(nodes.EnvironmentAttribute("turn"), node.test, lineno=node.lineno)
            return node

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "*", "**", "%"))
        concat = staticmethod(_concat)
        joined = staticmethod(_joined)

        @property
        def turn(self) -> bool:
            """Counts one turn of a loop."""
            return _spend(_WORK_OF_A_TURN)

        def _parse(self, source, name, filename):
            return Counting().visit(super()._parse(source, name, filename))

        def call_binop(self, context, operator, left, right):
            if operator == "*":
                for repeated, times in ((left, right), (right, left)):
                    if isinstance(repeated, str | list | tuple) and isinstance(times, int):
                        _spend(len(repeated) * max(times, 0))
            elif operator == "**" and isinstance(left, int) and isinstance(right, int):
                _spend(left.bit_length() * max(right, 0))
            elif operator == "%" and isinstance(left, str):
                _spend_on_growth("%", left, right if isinstance(right, tuple) else (right,))
            out = super().call_binop(context, operator, left, right)
            _spend(len(out) if isinstance(out, str | list | tuple) else 1)
            return out

        def call(self, context, function, *arguments, **options):
            method = getattr(function, "__wrapped__", function)
            owner = getattr(method, "__self__", None)
            if isinstance(owner, str):
                _spend_on_growth(method.__name__, owner, (*arguments, *options.values()))
            return super().call(context, function, *arguments, **options)

    return Environment


@functools.cache
def _generation() -> type:
    """``{% generation %}`` marks what the assistant writes, for those who ask; here it writes what is inside."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    return Generation


@functools.cache
def _namespace_type() -> type:
    """A namespace whose attributes cannot reach into Python."""
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    class PlainNamespace(Namespace):
        def __init__(*args, **kwargs):
            names = dict(*args[1:], **kwargs)
            Namespace.__init__(args[0])
            for name, value in names.items():
                args[0][name] = value

        def __setitem__(self, name, value):
            if str(name).startswith("_"):
                raise SecurityError(f"a namespace has no attribute {name!r}")
            super().__setitem__(name, value)

    return PlainNamespace

"""Holds docs/choose_a_method.md to the pages that it quotes.

A quoted cell is a link whose text is the value, ``[0.22](arena.md "rloo :: gap left")``. Its title names the leading
cells of a row, in full or by how they begin, and the column; a title without ``::`` is words of the page instead.
"""

import functools
import pathlib
import re

import pytest

from experiments.align.config import AlignConfig
from experiments.reward_model.__main__ import RewardConfig
from tiltjax.align.settings import UNTRAINED
from tiltjax.train import methods

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGE = (DOCS / "choose_a_method.md").read_text()
LINK = re.compile(r'\[([^\]\[]+)\]\(([^\s()]+)(?: "([^"]+)")?\)')


def links(page):
    """(text, target, title) of every link; a title is empty where there is none."""
    return LINK.findall(" ".join(page.split()))


def quotes(page):
    """The links that quote a cell."""
    return [link for link in links(page) if link[2]]


def headings(text):
    """(level, anchor, line) of every heading, with the anchor that GitHub gives it."""
    found, fenced = [], False
    for i, line in enumerate(text.splitlines()):
        fenced ^= line.startswith("```")
        if not fenced and (match := re.fullmatch(r"(#+) (.+)", line)):
            anchor = re.sub(r"[^\w\- ]", "", match[2].strip().lower()).replace(" ", "-")
            found.append((len(match[1]), anchor, i))
    return found


@functools.cache
def section(target):
    """The text that a target names: a page of docs, or what its anchor's heading is over."""
    path, _, anchor = target.partition("#")
    text = (DOCS / path).read_text() if path else PAGE
    if not anchor:
        return text
    places = headings(text)
    level, start = next((level, i) for level, name, i in places if name == anchor)
    end = next((i for depth, _, i in places if i > start and depth <= level), None)
    return "\n".join(text.splitlines()[start:end])


def tables(text):
    """Every table: the names of its columns, and its rows."""
    found, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
            rows.append([re.sub(r"\\([|*])", r"\1", cell).strip(" `*") for cell in cells])
        elif rows:
            found.append((rows[0], rows[2:]))
            rows = []
    return found


def values(text, title):
    """What stands in the cells that a title names, in every way in which it may be quoted; one set per row."""
    *keys, column = title.split(" :: ")
    rows = [(row, row[names.index(column)]) for names, rows in tables(text) for row in rows if column in names]
    exact = [cell for row, cell in rows if row[: len(keys)] == keys]
    prefixed = [cell for row, cell in rows if all(cell.startswith(key) for cell, key in zip(row, keys, strict=False))]
    found = []
    for cell in exact or prefixed:
        numbers = re.findall(r"[-+]?\d+(?:\.\d+)?(?:e-?\d+)?", cell)
        found.append({cell, cell.split(" [")[0], *(numbers if len(numbers) == 1 else [])})
    return found


def mismatches(page):
    """What a page quotes and is not so."""
    problems = []
    for value, target, title in quotes(page):
        if " :: " in title:
            found = values(section(target), title)
            good = len(found) == 1 and value in found[0]
        else:
            found = " ".join(section(target).split())
            good = title in found and re.search(rf"(?<![\w.]){re.escape(value)}(?![\w.])", title) is not None
        if not good:
            problems.append((value, target, title, found if " :: " in title else "no such words"))
    return problems


def test_every_number_is_the_cell_that_it_quotes():
    assert len(quotes(PAGE)) > 80
    assert mismatches(PAGE) == []


def test_a_changed_number_is_noticed():
    for value, target, title in quotes(PAGE):
        other = re.sub(r"\d(?=\D*$)", lambda digit: str((int(digit[0]) + 1) % 10), value)
        changed = mismatches(f'[{other}]({target} "{title}")')
        assert [problem[:3] for problem in changed] == [(other, target, title)]


def test_other_rows_and_columns_are_noticed():
    assert not mismatches('[0.22](arena.md "rloo :: gap left")')
    for title in ("rloo :: reward", "grpo :: gap left", "nobody :: gap left", "r :: gap left", "rloo :: nothing"):
        assert mismatches(f'[0.22](arena.md "{title}")')
    assert not mismatches('[3.5 of 6.4 nats](arena.md "3.5 of 6.4 nats are left")')
    assert mismatches('[3.5 of 6.4 nats](arena.md "3.5 of 6.4 nats were left")')
    assert mismatches('[5 of 6.4 nats](arena.md "3.5 of 6.4 nats are left")')


def test_every_link_has_its_target():
    for _, target, _ in links(PAGE):
        path, _, anchor = target.partition("#")
        assert not path or (DOCS / path).is_file(), target
        assert not anchor or anchor in [name for _, name, _ in headings(section(path))], target


def test_every_recommendation_has_a_measured_reason():
    recommendations = [rows for names, rows in tables(PAGE) if names[-1] in ("why, as measured", "measured reason")]
    assert [len(rows) > 7 for rows in recommendations] == [True, True]
    for row in (row for rows in recommendations for row in rows):
        assert quotes(" ".join(row)), row


def test_every_record_is_a_legal_name():
    names = re.findall(r"--method=(\w+)", PAGE)
    assert len(names) > 12
    assert set(names) <= {UNTRAINED, *methods.METHODS}
    rows = {title.split(" :: ")[0] for _, target, title in quotes(PAGE) if target.startswith(("arena.md", "arena/"))}
    assert {row for row in rows if re.fullmatch(r"\w+", row)} <= set(methods.METHODS)


def flags_of(command):
    """What the flags of a command line say: name -> value."""
    flags = dict(flag.removeprefix("--").split("=", 1) for flag in command.split())
    number = {True: int, False: float}
    numbers = {name: value for name, value in flags.items() if re.fullmatch(r"\d+(\.\d+)?", value)}
    return flags | {name: number[value.isdigit()](value) for name, value in numbers.items()}


@pytest.mark.parametrize(("program", "config"), [("align", AlignConfig), ("reward_model", RewardConfig)])
def test_every_command_is_legal(program, config):
    commands = re.findall(rf"`python -m experiments\.{program}((?: --[^`]*)?)`", PAGE)
    assert commands
    for command in commands:
        config(**flags_of(command))

import dataclasses
import itertools
import pathlib
import re
import unicodedata

import pytest

import tiltjax
from tiltjax import papers
from tiltjax.papers import PAPERS, citation
from tiltjax.train.methods import METHODS

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = [path for folder in ("tiltjax", "experiments") for path in sorted(ROOT.joinpath(folder).rglob("*.py"))]
NUMBER = re.compile(r"arXiv:([\w.-]+/\d{7}|\d{4}\.\d{4,5})")
TEXTS = sorted({method.paper for method in METHODS.values()})


def plain(text):
    """Without accents."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def entries(text):
    """A minimal reading of BibTeX: key -> (kind, fields). Braces must balance, and nothing lies between the entries."""
    found = {}
    for entry in text.split("\n\n"):
        kind, key, body = re.fullmatch(r"@(\w+)\{([a-z0-9]+),\n(.*)\n\}", entry, re.DOTALL).groups()
        fields = dict(re.fullmatch(r"  (\w+) = \{(.*)\}", line).groups() for line in body.split(",\n"))
        for value in fields.values():
            depth = list(itertools.accumulate((c == "{") - (c == "}") for c in value))
            assert not value or (min(depth) >= 0 and depth[-1] == 0), value
        assert key not in found
        found[key] = (kind, fields)
    return found


def test_every_number_in_the_sources_is_known():
    named = {number: path.name for path in SOURCES for number in NUMBER.findall(path.read_text())}
    assert len(named) > 100
    assert {number: name for number, name in named.items() if number not in PAPERS} == {}
    assert {paper.arxiv for paper in PAPERS.values() if paper.arxiv} <= set(named)


def test_the_sources_name_the_authors_and_the_year_of_a_number():
    """As in "Jiao, Chen, Li, 2025, arXiv:2509.04372" and "Wu et al., 2024 (SPPO), [arXiv:2405.00675]"."""
    wrong = []
    for path in SOURCES:
        text = re.sub(r'"?\s*\n\s*"?', " ", path.read_text())
        for match in NUMBER.finditer(text):
            paper = PAPERS[match[1]]
            before = re.split(r'[;:"]', text[max(0, match.start() - 90) : match.start()])[-1]
            (year,) = re.findall(r"\b(?:19|20)\d\d\b", before)[-1:] or ["0"]
            late = int(year) - paper.year
            families = [plain(papers._family(author)) for author in paper.authors]
            if "et al." in before:
                right = f"{families[0]} et al." in before and len(families) > 2
            else:
                right = all(family in before for family in families)
            if not right or not 0 <= late <= (9 if match[1] == "1507.02646" else 1):
                wrong.append((path.name, match[1], before))
    assert not wrong, wrong


@pytest.mark.parametrize("text", TEXTS)
def test_a_record_and_its_entry_agree(text):
    (paper,) = papers._cited(text)
    authors, year = re.match(r"(.*?),? (\d{4})\b", text).groups()
    assert re.split(r" et al\.|, ", authors)[0] == paper.family
    assert abs(int(year) - paper.year) <= 1
    if paper.arxiv:
        assert NUMBER.search(text)[1] == paper.arxiv
    else:
        assert int(year) == paper.year


def test_papers_are_sorted_unique_and_whole():
    numbers = [number for number, paper in PAPERS.items() if paper.arxiv and "/" not in number]
    others = [key for key, paper in PAPERS.items() if not paper.arxiv]
    assert numbers == sorted(numbers)
    assert others == sorted(others)
    assert (
        len(PAPERS) == len({paper.key for paper in PAPERS.values()}) == len({paper.title for paper in PAPERS.values()})
    )
    for name, paper in PAPERS.items():
        assert name == (paper.arxiv or paper.key)
        assert re.fullmatch(rf"[a-z]+{paper.year}[a-z0-9]+", paper.key)
        assert bool(paper.arxiv) != bool(paper.venue)
        assert len(paper.authors) <= 8
        assert "others" not in paper.authors or (len(paper.authors), paper.authors[-1]) == (7, "others")
        assert all(author.strip() == author and author for author in (paper.title, *paper.authors))
        if paper.arxiv and "/" not in name:
            assert paper.year == 2000 + int(name[:2])


def test_every_entry_is_bibtex():
    found = entries(citation(*PAPERS))
    assert list(found) == [paper.key for paper in PAPERS.values()]
    for key, (kind, fields) in found.items():
        assert kind == "misc"
        assert {"title", "author", "year"} <= set(fields), key
        assert ("eprint" in fields) == (fields.get("url") == f"https://arxiv.org/abs/{fields.get('eprint')}")
        assert fields["title"].startswith("{")
    assert found["mitchell2023note"][1]["title"].endswith(r"preferences \& relationship to IPO}")
    assert found["mitchell2023note"][1]["url"] == "https://ericmitchell.ai/cdpo.pdf"
    assert found["peters2007reinforcement"][1]["howpublished"] == "ICML"
    assert found["doosterlinck2024anchored"][1]["author"].startswith("Karel D'Oosterlinck and ")
    assert found["delmoral2006sequential"][1]["author"] == "Del Moral, Pierre and Arnaud Doucet and Ajay Jasra"
    assert found["cobbe2021training"][1]["author"].endswith(" and others")


@pytest.mark.parametrize("name", METHODS)
def test_every_record_has_a_citation(name):
    ((key, (_, fields)),) = entries(citation(name)).items()
    assert key != "tiltjax"
    assert fields.get("eprint", "") in METHODS[name].paper


def test_a_record_a_kernel_and_a_number_give_the_same_entry():
    dpo = citation("dpo")
    assert dpo == citation("2305.18290") == citation("arXiv:2305.18290") == citation("dpo", "online_dpo")
    assert list(entries(citation("dpo_loss"))) == ["rafailov2023direct", "mitchell2023note", "wang2023beyond"]
    assert citation("dpo_loss").startswith(dpo)
    for path in ("losses.dpo_loss", "losses.preference.dpo_loss", "tiltjax.losses.preference.dpo.dpo_loss"):
        assert citation(path) == citation("dpo_loss")
    assert list(entries(citation("tilt.tilt", "dpo"))) == ["jiao2025connections", "rafailov2023direct"]
    assert list(entries(citation("soft_best_of_n"))) == ["verdun2025soft", "jiao2025connections"]
    assert list(entries(citation("kl_k1"))) == ["schulman2020approximating", "liu2025rethinking"]
    assert list(entries(citation("exact.gap.excess_nll"))) == ["swamy2025all"]  # from its module


def test_without_a_paper_it_is_tiltjaxs_own():
    readme = re.search(r"```bibtex\n(.*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert citation() == readme == tiltjax.citation("masked_mean")
    ((key, (kind, fields)),) = entries(readme).items()
    assert (key, kind) == ("tiltjax", "software")
    cff = (ROOT / "CITATION.cff").read_text()
    assert f'title: "{fields["title"]}"' in cff
    assert f"name: {fields['author'].strip('{}')}\n" in cff
    assert f"license: {fields['license']}\n" in cff


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dpo_los", r"name must be .*; got 'dpo_los'; did you mean 'dpo_loss'"),
        ("grop", r"name must be .*; got 'grop'; did you mean 'grpo'"),
        ("2305.18291", r"name must be .*; got '2305.18291'; did you mean '2305.18290'"),
        ("losses.tilt", r"name must be .*; got 'losses.tilt'"),
        ("zzzz", r"got 'zzzz'$"),
        ("", r"got ''$"),
        ("merge", r"say which merge, models.lora.merge or ops.logspace.merge or samplers.best_of_n.merge; got 'merge'"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        citation("dpo", name)


def test_papers_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PAPERS["2305.18290"].year = 2024

"""``docs/performance.md`` from the rows of a run: goals beside figures, every setting, memory, the rest."""

import os
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks import harness
from benchmarks.cases import CASES, Case
from benchmarks.profile_report import profiles, table

__all__ = ["ratio", "write"]

Row = dict[str, Any]

_NOTES = ("<!-- notes: kept when the page is written again -->", "<!-- end of notes -->")
_NAMES = {"trl": "TRL", "tunix": "Tunix", "tiltjax": "tiltjax"}


def write(rows: Sequence[Row], path: str | os.PathLike, *, shape: str) -> str:
    """Writes the page; what stands between its two markers stays.

    Args:
      rows: Of one run.
      path: The page.
      shape: Whose table of goals it shows.

    Returns:
      The table of goals.
    """
    path = pathlib.Path(path)
    timed = [row for row in rows if "measure" not in row and row["shape"] == shape]
    goals = _goals(timed)
    gpu = [row for row in harness.rows() if row.get("measure") == "gpu" and row["shape"] != "tiny"]
    sections = [
        "# Speed and memory",
        _conditions(rows),
        f"## Against the peers, {shape} shape",
        _READING,
        goals,
        "## Peak memory",
        "GB of resident memory of the whole process, in the same runs. Goal: at most half of TRL's where completions "
        "share a prompt, never more than TRL's; judged by the largest of tiltjax's processes against TRL's fastest "
        "setting, its leanest beside; `cached`: the largest of those that found their program in the cache on disk.",
        _memory(timed),
        *_parts(timed),
        "## Every setting",
        "Seconds: median [least, most] over all timed calls; CPU: process CPU seconds of a call, which neighbours move "
        "less; others: cores that other processes used meanwhile (figures above 0.2 are not those of a quiet machine); "
        "work: useful GFLOP, with a prompt computed once (tiltjax) or for every completion (peers); share: that work "
        "per second over a plain matrix product of 2048 x 2048 in the same process with operands of the same type.",
        _settings(timed),
        *profiles(rows, shape),
        *_rest(rows, shape),
        "## On a GPU",
        _gpu(gpu),
        _kept(path),
    ]
    text = "\n\n".join(section for section in sections if section) + "\n"
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)
    return goals


_READING = (
    "Ratio: the peer's median over tiltjax's, [slowest tiltjax against fastest peer, the reverse]. TRL: the fastest of "
    "the settings named in brackets; `*`: not all of its three were measured in this run. One process per measurement, "
    "a call to warm up, the libraries in turns."
)


def ratio(peer: Sequence[Row], mine: Sequence[Row]) -> tuple[float, float, float]:
    """Median over median, and the two ends that the laps allow."""
    a, b = _laps(peer), _laps(mine)
    return statistics.median(a) / statistics.median(b), min(a) / max(b), max(a) / min(b)


def _laps(rows: Iterable[Row]) -> list[float]:
    return [lap for row in rows for lap in row["laps"]]


def _pick(rows: Iterable[Row], **wanted: str) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def _by_dtype(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by setting, the fastest first."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["dtype"], []).append(row)
    return dict(sorted(groups.items(), key=lambda item: statistics.median(_laps(item[1]))))


def _goals(rows: Sequence[Row]) -> str:
    body = []
    for case in CASES:
        mine = _pick(rows, case=case.name, library="tiltjax")
        cells = [case.text, f"{statistics.median(_laps(mine)):.2f}" if mine else "-"]
        peers = []
        for library, settings in (("trl", 3), ("tunix", 0)):
            groups = _by_dtype(_pick(rows, case=case.name, library=library))
            cells += _against(groups, mine, settings)
            if groups and mine:
                peers.append(ratio(next(iter(groups.values())), mine)[0])
        if not mine and cells.count("-") == len(cells) - 1:
            continue
        goal = f"{case.goal:g}" if case.goal else "-"
        body.append([*cells, goal, _verdict(case, peers)])
    head = ["work", "tiltjax, s", "TRL, s", "ratio", "Tunix, s", "ratio", "goal", "verdict"]
    return table(head, body)


def _against(groups: dict[str, list[Row]], mine: list[Row], settings: int) -> list[str]:
    if not groups:
        return ["-", "-"]
    dtype, rows = next(iter(groups.items()))
    star = "*" if len(groups) < settings else ""
    seconds = f"{statistics.median(_laps(rows)):.2f} ({dtype}{star})"
    if not mine:
        return [seconds, "-"]
    middle, low, high = ratio(rows, mine)
    return [seconds, f"{middle:.2f} [{low:.2f}, {high:.2f}]"]


def _verdict(case: Case, ratios: list[float]) -> str:
    if case.goal is None:
        return "no goal"
    if not ratios:
        return "not measured"
    return "met" if min(ratios) >= case.goal else "**missed**"


def _memory(rows: Sequence[Row]) -> str:
    body = []
    for case in CASES:
        mine = _pick(rows, case=case.name, library="tiltjax")
        groups = _by_dtype(_pick(rows, case=case.name, library="trl"))
        if not mine or not groups:
            continue
        peaks = {dtype: _peak(found) for dtype, found in groups.items()}
        fastest, leanest = next(iter(peaks)), min(peaks, key=lambda dtype: peaks[dtype])
        tunix = _pick(rows, case=case.name, library="tunix")
        goal = 0.5 if case.N > 1 and case.S > 1 else 1.0
        share = _peak(mine) / peaks[fastest]
        cached = [row for row in mine if row.get("cached")]
        cells = [case.text, f"{_peak(mine):.2f}", f"{_peak(cached):.2f}" if cached else "-"]
        cells += [f"{peaks[fastest]:.2f} ({fastest})", f"{share:.2f}"]
        cells += [f"{peaks[leanest]:.2f} ({leanest})", f"{_peak(mine) / peaks[leanest]:.2f}"]
        cells += [f"{min(row['peak_gb'] for row in tunix):.2f}" if tunix else "-", f"{goal:g}"]
        body.append([*cells, "met" if share <= goal else "**missed**"])
    head = ["work", "tiltjax", "cached", "TRL, fastest", "share", "TRL, leanest", "share", "Tunix", "goal", "verdict"]
    return table(head, body) if body else "No peer was measured."


def _parts(rows: Sequence[Row]) -> list[str]:
    """What the peak of tiltjax's processes consists of."""
    body = []
    for case in CASES:
        mine = [row for row in _pick(rows, case=case.name, library="tiltjax") if "program_gb" in row]
        for cached in (False, True):
            if found := [row for row in mine if row["cached"] == cached]:
                top = max(found, key=lambda row: row["peak_gb"])
                known = [top[name] for name in ("libraries_gb", "arrays_gb", "program_gb")]
                rest = top["peak_gb"] - sum(known)
                state = "from the cache" if cached else "compiled"
                body.append([case.text, state, *(f"{x:.2f}" for x in (top["peak_gb"], *known, rest))])
    if not body:
        return []
    text = (
        "What tiltjax's consist of: interpreter and libraries; arrays between two calls (parameters, optimizer, data); "
        "temporaries of the largest program (gradients, activations, caches), by XLA's own count; the rest is the "
        "compiler's, the allocator's and what the peak did not need at once (then it is negative)."
    )
    head = ["work", "program", "peak", "libraries", "arrays", "temporaries", "rest"]
    return [text, table(head, body)]


def _peak(rows: Iterable[Row]) -> float:
    return max(row["peak_gb"] for row in rows)


def _settings(rows: Sequence[Row]) -> str:
    body = []
    for case in CASES:
        for library in _NAMES:
            for dtype, found in _by_dtype(_pick(rows, case=case.name, library=library)).items():
                body.append(_setting(case, f"{_NAMES[library]} {dtype}", found))
    head = ["work", "setting", "seconds", "laps", "CPU, s", "others", "work, GFLOP", "share", "peak, GB"]
    return table(head, body)


def _setting(case: Case, name: str, rows: list[Row]) -> list[str]:
    laps, middle = _laps(rows), lambda key: statistics.median(row[key] for row in rows)
    warm = "" if all(row["warmed_up"] for row in rows) else ", the first call"
    return [
        case.text,
        name,
        f"{statistics.median(laps):.3g} [{min(laps):.3g}, {max(laps):.3g}]",
        f"{len(laps)} in {len(rows)}{warm}",
        f"{middle('cpu_seconds'):.3g}",
        f"{middle('others'):.1f}",
        f"{rows[0]['gflop']:,.0f}",
        f"{middle('gemm_share'):.0%}",
        f"{_peak(rows):.2f}",
    ]


def _rest(rows: Sequence[Row], shape: str) -> list[str]:
    """What stands on its own: other shapes, time to the first step, imports, and what failed."""
    sections = []
    others = [row for row in rows if "measure" not in row and row["shape"] != shape]
    for name in sorted({row["shape"] for row in others}):
        sections += [f"## The {name} shape", _settings(_pick(others, shape=name))]
    compiled = [row for row in rows if row.get("measure") == "compile"]
    if compiled:
        keys = ("import_seconds", "trace_seconds", "lower_seconds", "compile_seconds", "to_first_step_seconds")
        body = [[row["case"], row["shape"], row["cache"], *(f"{row[key]:.1f}" for key in keys)] for row in compiled]
        head = ["work", "shape", "cache", "imports, s", "trace", "lower", "compile", "process to the end of step 1"]
        sections += ["## Time to the first step", table(head, body)]
    imported = [row for row in rows if row.get("measure") == "imports"]
    if imported:
        body = [[_NAMES[row["library"]], f"`{row['statement']}`", f"{row['seconds']:.2f}"] for row in imported]
        sections += ["## Import time", table(["environment", "statement", "seconds, above an empty one"], body)]
    failed = [row for row in rows if row.get("measure") == "failure"]
    if failed:
        body = [[row["case"], row["library"], row["dtype"], row["why"].replace("|", "/")] for row in failed]
        sections += ["## What failed", table(["work", "library", "setting", "why"], body)]
    return sections


def _gpu(rows: Sequence[Row]) -> str:
    if not rows:
        return (
            "`python -m benchmarks.gpu` has not been run: no GPU was at hand. A test runs it on the CPU at a tiny size."
        )
    body = [
        [row["device"], row["shape"], row["text"], f"{row['seconds']:.4g}", row["figure"], row["goal"]] for row in rows
    ]
    return table(["device", "shape", "work", "seconds", "figure", "goal"], body)


def _conditions(rows: Sequence[Row]) -> str:
    last = rows[-1]
    machine = last["machine"]
    # Every environment has its own.
    versions = sorted({item for row in rows for item in row["versions"].items()})
    units = f" with {', '.join(machine['units'])}" if machine["units"] else ""
    shown = ", ".join(f"{name} {value}" for name, value in versions)
    dates = sorted(row["date"] for row in rows)
    commits = ", ".join(sorted({row["commit"] or "no checkout" for row in rows}))
    busy = statistics.median([row["others"] for row in rows if "others" in row] or [0.0])
    loud = f" **The machine was not quiet: other processes used {busy:.1f} cores (median).**" if busy > 0.2 else ""
    return (
        f"`make bench` (`benchmarks/peers/setup.sh` first, for the peers) wrote this page; run `{last['run']}`, "
        f"{dates[0]} to {dates[-1]}, commit {commits}. {machine['cpu']}{units}, {machine['threads']} threads, "
        f"{machine['memory_gb']:.0f} GB; {shown}. Random weights of the shape, random tokens without padding. Every "
        f"process, tiltjax and peers alike, ran with `GLIBC_TUNABLES={machine['GLIBC_TUNABLES']}`, which has to be set "
        f"before a process starts.{loud}"
    )


def _kept(path: pathlib.Path) -> str:
    text = path.read_text() if path.exists() else ""
    start, end = _NOTES
    inside = text.partition(start)[2].partition(end)[0].strip() if start in text else ""
    return f"{start}\n{inside}\n{end}" if inside else f"{start}\n{end}"

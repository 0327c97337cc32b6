"""The report of `experiments.plan`, paragraph by paragraph."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.common.launch import command
from tiltjax.analysis import CHIPS, Prediction

__all__ = ["render"]


def render(
    config: Any,
    result: dict[str, Any],
    predicted: Mapping[str, Prediction],
    checks: Mapping[str, list[dict[str, Any]]] | None = None,
) -> list[str]:
    """Headings, tables and text of ``report.md``.

    Args:
      config: `experiments.plan.__main__.PlanConfig`.
      result: Of `experiments.plan.compile.run`.
      predicted: By the names of `tiltjax.analysis.CHIPS`.
      checks: Of `experiments.plan.__main__.validate`, if it ran.

    Returns:
      One string per paragraph.
    """
    shape, seconds = config.shape, result["seconds"]
    what = f"adapters of rank {config.lora_rank}" if config.lora_rank else "all parameters"
    loops = result["unknown_loops"] + result["opaque"]
    parts = [
        f"# One {config.method} step of {config.policy} on {config.mesh}",
        f"{result['parameters']:,} parameters, of which {result['trained']:,} are trained ({what}, "
        f"{config.param_dtype}, AdamW); {config.compute_dtype} operands, remat {config.remat}. A batch is {shape.B} "
        f"prompts of {shape.S} "
        f"tokens with {shape.N} completions of {shape.T} each, in {config.microbatches} part(s), over "
        f"{result['devices']} devices. Lowered in {seconds['lower']:.0f} s and compiled in {seconds['compile']:.0f} s, "
        f"with {_gb(result['host_peak'])} of host memory.",
        "## Per device",
        _device_table(result),
        "## Sent by each device in a step",
        _collective_table(result["collectives"]),
        "## Predicted step",
        _chip_table(result, predicted) if predicted else "No prediction: the datasheets' peak is of bfloat16 products.",
        _READING,
    ]
    if loops:
        parts.append(f"Not counted in full (loops of unknown length count once, opaque calls not): {', '.join(loops)}.")
    if predicted:
        parts += ["## Datasheets", _datasheet(predicted)]
    if checks:
        parts += ["## Held to what can be measured here", *_validation(checks)]
    return [*parts, "## Command", f"```\n{command('plan', config)}\n```"]


_READING = """\
Operations are those of the matrix products, loops counted as often as they run ("counted", read from the compiled
program) and from the architecture ("analytic", divided by the number of devices: where "counted" is larger, devices
repeat each other's work, or one alone pads the bfloat16 products of gradients, as a CPU needs it). XLA's own cost
analysis, given beside them, counts the body of a loop once and elementwise operations too. "Needed by the mathematics"
leaves out what is computed again.

Memory is that of this CPU compilation: products widened to float32 where the CPU has no narrower ones, plain attention
with all of its scores, and no scheduling for memory. An accelerator's compiler starts from the same sharded program and
arrives at other temporaries. Gradients are part of the temporaries, and so is what is kept for the gradient.

Activations are what the forward pass of one part of the batch hands to its backward pass under the chosen remat: all
arrays that depend on the batch, each divided as XLA places it, the batch itself left out. What depends on parameters
alone stands below them: a second copy, gathered or converted; parameters as they are stored are left out. Both are read
from the program before XLA optimises it, which may keep less and compute more. They lie side by side when the forward
pass ends; the rest of the temporaries comes and goes.

The least traffic is what the products read and write and the arguments
and results once, as if everything else were fused into them; the traffic as compiled is that of every instruction.

What a device sends is counted as a ring sends it: an all-gather (g-1) times its operand for a group of g, a
reduce-scatter and an all-to-all (g-1)/g times, an all-reduce 2(g-1)/g times. The CPU's compiler leaves an all-reduce
followed by a slice where an accelerator's makes a reduce-scatter of half the bytes, and may send float32 for bfloat16:
the figures are upper bounds.

The predicted step is the largest of the three times at datasheet peaks, so no step can be faster than that unless it
sends or moves less; "nothing overlaps" is their sum. Devices are numbered along the mesh, last axis fastest, so groups
of the last axes are neighbours. A group inside one domain (a host of GPUs, a pod of TPUs) sends over the links of
one mesh axis; one that leaves it sends over the network of the data centre."""


def _device_table(result: dict[str, Any]) -> str:
    memory, flops, traffic = result["memory"], result["flops"], result["traffic"]
    sent = sum(one["wire_bytes"] for one in result["collectives"])
    rows = [(name, _gb(memory[name])) for name in ("parameters", "optimizer", "gradients")]
    rows += [
        ("activations, kept for the gradient", _gb(memory["activations"])),
        ("parameters, kept for the gradient gathered or converted", _gb(memory["kept_parameters"])),
        ("temporaries (activations, gradients, gathered parameters)", _gb(memory["temporaries"])),
        ("peak memory", _gb(memory["peak"])),
        ("operations, counted", _tera(flops["counted"])),
        ("operations, analytic", _tera(flops["analytic"])),
        ("operations, needed by the mathematics", _tera(flops["model"])),
        ("operations by XLA's cost analysis", _tera(flops["cost_analysis"])),
        ("memory traffic, least", _gb(traffic["least"])),
        ("memory traffic, as compiled", _gb(traffic["as_compiled"])),
        ("sent", _gb(sent)),
        ("operations per byte of least traffic", f"{flops['counted'] / traffic['least']:.0f}"),
        ("operations per byte sent", f"{flops['counted'] / sent:.0f}" if sent else "-"),
    ]
    return _table(("what", "per device"), rows)


def _collective_table(collectives: list[dict[str, Any]]) -> str:
    totals: dict[tuple[str, str, int], list[float]] = {}
    for one in collectives:
        entry = totals.setdefault((one["axes"], one["kind"], len(one["group"])), [0, 0.0])
        entry[0] += one["times"]
        entry[1] += one["wire_bytes"]
    ordered = sorted(totals.items(), key=lambda item: -item[1][1])
    rows = [(axes, kind, str(size), f"{times:.0f}", _gb(sent)) for (axes, kind, size), (times, sent) in ordered if sent]
    return _table(("mesh axes", "collective", "group", "times", "sent"), rows) if rows else "Nothing is sent."


def _chip_table(result: dict[str, Any], predicted: Mapping[str, Prediction]) -> str:
    rows = []
    for name, p in predicted.items():
        chip, peak = CHIPS[name], result["memory"]["peak"]
        utilisation = result["flops"]["model"] / (chip.flops * p.seconds)
        network = "unknown" if p.network is None else _seconds(p.network)
        fits = "yes" if p.fits else "no"
        rows.append((chip.name, f"{fits} ({peak / chip.memory:.0%})", _seconds(p.compute), _seconds(p.memory), network,
                     f"**{_seconds(p.seconds)}**", p.bound, _seconds(p.serial), f"{utilisation:.0%}"))  # fmt: skip
    head = (
        "chip",
        "fits",
        "compute",
        "memory",
        "network",
        "step, at best",
        "bound by",
        "nothing overlaps",
        "model FLOP/s at best",
    )
    return _table(head, rows)


def _datasheet(predicted: Mapping[str, Prediction]) -> str:
    rows = []
    for chip in (CHIPS[name] for name in predicted):
        far = "not stated" if chip.far is None else f"{chip.far / 1e9:.3g} GB/s"
        rows.append((chip.name, f"{chip.flops / 1e12:.0f} TFLOP/s", f"{chip.memory / 1e9:.0f} GB",
                     f"{chip.bandwidth / 1e9:,.0f} GB/s", f"{chip.near / 1e9:.0f} GB/s among {chip.domain}", far,
                     chip.source))  # fmt: skip
    return _table(
        ("chip", "bfloat16", "memory", "bandwidth", "one mesh axis, one way", "beyond, one way", "source"), rows
    )


def _share(row: Mapping[str, Any], counts: str) -> str:
    return _ratio(row[counts], row["analytic"]) if counts in row else "-"


def _validation(checks: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    flops = [
        (row["name"], row["remat"], _tera(row["analytic"]),
         *(_share(row, counts) for counts in ("counted", "counted_unrolled", "unrolled", "cost_analysis")))
        for row in checks["flops"]
    ]  # fmt: skip
    memory = [
        (row["policy"], row["mesh"], " x ".join(str(v) for v in row["shape"].values()), _gb(row["planned"]),
         _gb(row["measured"]), _ratio(row["planned"], row["measured"]))
        for row in checks["memory"]
    ]  # fmt: skip
    head = ("model", "remat", "analytic", "counted / analytic", "counted, loops unrolled / analytic",
            "cost analysis, loops unrolled / analytic", "cost analysis as it is / analytic")  # fmt: skip
    return [
        _table(head, flops),
        "The peak that was planned, over all devices, against what the memory of the process grew by while it held the "
        "state and ran two steps (float32):",
        _table(("policy", "mesh", "B x N x S x T", "planned", "measured", "planned / measured"), memory),
    ]


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ("---",) * len(head), *rows])


def _gb(value: float) -> str:
    return f"{value / 1e9:.3g} GB" if value >= 1e8 else f"{value / 1e6:.3g} MB"


def _tera(value: float) -> str:
    return f"{value / 1e12:.4g} T" if value >= 1e11 else f"{value / 1e9:.4g} G"


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _ratio(a: float, b: float) -> str:
    return f"{a / b:.3f}"

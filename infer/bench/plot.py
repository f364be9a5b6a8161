"""The roofline picture: what was reached, under the limits of the device."""

from __future__ import annotations

from glm2_jax.errors import InputError
from glm2_jax.mesh import mesh_text
from infer.bench.report import Report, variant_name, what

_MARKERS = "osDv^P*X"


def draw(report: Report, path: str) -> None:
    """Write the picture; both axes are logarithmic.

    Raises:
        InputError: there is nothing to draw, or the file cannot be written.
    """
    from matplotlib.figure import Figure

    results = [result for result in report.results if result.seconds]
    ceilings = report.ceilings
    if ceilings is None or not results:
        raise InputError("--plot: nothing was measured, so there is nothing to draw.")
    intensities = [result.flops / result.bytes for result in results]
    ridge = max(ceilings.matmul.values()) / ceilings.bandwidth
    low, high = min(intensities) / 2, max(*intensities, ridge) * 2

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots()
    for name, top in ceilings.matmul.items():
        bend = top / ceilings.bandwidth
        places = [low, bend, high]
        heights = [min(place * ceilings.bandwidth, top) / 1e12 for place in places]
        axes.plot(places, heights, linewidth=1.5, label=f"ceiling {name}: {top / 1e12:.3g} TFLOP/s")
    variants = list(dict.fromkeys(result.variant for result in results))
    for number, variant in enumerate(variants):
        own = [result for result in results if result.variant == variant]
        axes.plot(
            [result.flops / result.bytes for result in own],
            [result.per_second(result.flops) / 1e12 for result in own],
            linestyle="none",
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=7,
            label=variant_name(variant),
        )
    _name_points(axes, results)
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set_xlabel("operations per byte that has to be read")
    axes.set_ylabel("TFLOP/s")
    mesh = "" if report.mesh is None else f", {mesh_text(report.mesh)}"
    axes.set_title(
        f"{report.about.get('device', '')}{mesh}, {ceilings.bandwidth / 1e9:.3g} GB/s measured",
        wrap=True,
    )
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)


def _name_points(axes, results) -> None:
    """Name a shape once, at its highest point: the points of the variants are close together."""
    best = {}
    for result in results:
        name = what(result)
        if name not in best or result.rate > best[name].rate:
            best[name] = result
    for name, result in best.items():
        place = result.flops / result.bytes, result.per_second(result.flops) / 1e12
        axes.annotate(
            name, place, xytext=(0, 7), textcoords="offset points", fontsize=8, ha="center"
        )

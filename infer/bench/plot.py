"""The roofline picture: what was reached, under the limits of the device."""

from glm2_jax.errors import InputError
from glm2_jax.mesh import mesh_text
from infer.bench.report import Report, Result

_MARKERS = "osDv^P*X"


def draw(report: Report, path: str) -> None:
    """Write the picture; both axes are logarithmic. InputError: nothing to draw."""
    from matplotlib.figure import Figure

    results = [result for result in report.results if result.seconds]
    ceilings = report.ceilings
    if ceilings is None or not results:
        raise InputError("--plot: nothing was measured, so there is nothing to draw.")
    intensities = [_point(result)[0] for result in results]
    ridge = max(ceilings.matmul.values()) / ceilings.bandwidth
    low, high = min(intensities) / 2, max(*intensities, ridge) * 2

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots()
    for name, top in ceilings.matmul.items():
        places = [low, top / ceilings.bandwidth, high]
        heights = [min(place * ceilings.bandwidth, top) / 1e12 for place in places]
        axes.plot(places, heights, linewidth=1.5, label=f"ceiling {name}: {top / 1e12:.3g} TFLOP/s")
    for number, variant in enumerate(dict.fromkeys(result.variant for result in results)):
        own = [_point(result) for result in results if result.variant == variant]
        marker = _MARKERS[number % len(_MARKERS)]
        axes.plot(
            *zip(*own, strict=True), linestyle="none", marker=marker, markersize=7,
            label=variant.name,
        )  # fmt: skip
    # A shape is named once, at its highest point: those of the variants are close together.
    best = {result.what: result for result in sorted(results, key=lambda result: result.rate)}
    for name, result in best.items():
        axes.annotate(
            name, _point(result), xytext=(0, 7), textcoords="offset points", fontsize=8,
            ha="center",
        )  # fmt: skip
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


def _point(result: Result) -> tuple[float, float]:
    """Return operations per byte, and TFLOP/s."""
    assert result.bytes is not None
    return result.flops / result.bytes, result.per_second(result.flops) / 1e12

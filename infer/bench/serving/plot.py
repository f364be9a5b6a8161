"""The picture of a measured load: throughput and latencies, by users or requests per second."""

from infer.bench.serving.report import Report

_SHOWN = (("ttft", "time to first token, ms"), ("inter_token", "inter-token latency, ms"))


def draw(report: Report, path: str) -> None:
    """Write the picture of a report with at least one result."""
    from matplotlib.figure import Figure

    rated = report.results[0].level.rate is not None
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    throughput, *latencies = figure.subplots(1, 3)
    for server in dict.fromkeys(result.server for result in report.results):
        own = [result for result in report.results if result.server == server]
        places = [result.level.rate if rated else result.level.users for result in own]
        rates = [result.figures.tokens_per_s for result in own]
        throughput.plot(places, rates, marker="o", label=server)
        for axes, (name, _) in zip(latencies, _SHOWN, strict=True):
            for percentile, style in (("p50", "-"), ("p99", "--")):
                times = [getattr(result.figures, name) for result in own]
                points = [
                    (place, 1e3 * getattr(found, percentile))
                    for place, found in zip(places, times, strict=True)
                    if found is not None
                ]
                if points:
                    label = f"{server}, {percentile}"
                    axes.plot(*zip(*points, strict=True), style, marker="o", label=label)
    throughput.set_ylabel("tokens per second")
    for axes, (_, label) in zip(latencies, _SHOWN, strict=True):
        axes.set_ylabel(label)
    for axes in (throughput, *latencies):
        axes.set_xlabel("requests per second" if rated else "users")
        axes.set_ylim(bottom=0)
        axes.grid(True, alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(f"{report.about.get('model', '')}, {report.about.get('host', '')}", wrap=True)
    figure.savefig(path, dpi=150)

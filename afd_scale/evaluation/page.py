"""What our pages share: templates, numbers, drawings in the page's colours, files inside the page."""

import base64
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

# Stand-in colours of drawings, replaced by what the page's light or dark theme gives.
COLOURS = {"#010203": "currentColor", "#040506": "var(--accent)", "#070809": "var(--rule)"}
INK, LINE, RULE = COLOURS


def render(template: str, package: str = "afd_scale.evaluation", **values: Any) -> str:
    """A page from a template of a package; it may extend one beside this file."""
    places = [jinja2.PackageLoader(each, ".") for each in dict.fromkeys((package, "afd_scale.evaluation"))]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(places), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return environment.get_template(template).render(values)


def data_url(path: Path, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(path.read_bytes()).decode()}"


def aligned(values: Sequence[float]) -> list[str]:
    """Numbers of one row with equal decimals: three digits of the smallest, at most three decimals."""
    decimals = decimals_for(values)
    return [f"{value:.{decimals}f}" if math.isfinite(value) else "-" for value in values]


def decimals_for(values: Sequence[float]) -> int:
    """That show three digits of the smallest number, at most three."""
    sizes = [abs(value) for value in values if value and math.isfinite(value)]
    return min(3, max(0, 2 - math.floor(math.log10(min(sizes))))) if sizes else 0


def bands_svg(times: Sequence[float], means: Mapping[str, Sequence[float]], spreads: Sequence[float]) -> Markup:
    """Means over time, by the colour of their line; the last has its spread around it."""

    def draw(axes: Any) -> None:
        *_, last = means.values()
        band = [[mean + sign * spread for mean, spread in zip(last, spreads, strict=True)] for sign in (-1, 1)]
        axes.fill_between(times, *band, color=INK, alpha=0.15, linewidth=0)
        for colour, values in means.items():
            axes.plot(times, values, color=colour, linewidth=1.5, marker="o", markersize=3)

    return small_svg(draw)


def distributions_svg(samples: Mapping[str, Sequence[float]]) -> Markup:
    """Distribution functions, by the colour of their line."""

    def draw(axes: Any) -> None:
        for colour, values in samples.items():
            if values:
                axes.ecdf(values, color=colour, linewidth=1.5)

    return small_svg(draw)


def small_svg(draw: Callable[[Any], None]) -> Markup:
    """What is drawn on axes whose colours and font are those of the page."""

    def figure() -> Any:
        from matplotlib.figure import Figure  # a second to import, for the rank that draws
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(3.4, 1.7))
        axes = figure.add_axes((0.15, 0.15, 0.83, 0.78))
        axes.patch.set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        draw(axes)
        axes.grid(axis="y", color=RULE, linewidth=0.7)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(RULE)
        axes.tick_params(length=0, labelsize=8, labelcolor=INK)
        axes.margins(x=0.02, y=0.1)
        return figure

    return figure_svg(figure)


def figure_svg(make: Callable[[], Any]) -> Markup:
    """A figure for a page, whose theme gives the stand-in colours."""
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "afd_scale"}):
        buffer = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        make().savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    # Inside HTML the prologue and the namespaces have no use, and they hold the only URLs.
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :])
    for stand_in, colour in COLOURS.items():
        svg = svg.replace(stand_in, colour)
    return Markup(svg)

"""``facemae report``: one HTML page from a leakage folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2

from cluster.picture import PictureError
from cluster.shard import sha256_hex
from cluster.store import open_store
from jobs.command import Config, main_of
from jobs.report_data import LITTLE_UTILITY, NO_UTILITY, WEAK_ATTACKER, CurveData, Measurement, read_measurement
from jobs.report_pictures import Picture, choose_pictures
from jobs.report_plots import cmc_panels, similarity_panels
from jobs.report_steps import UNREADABLE, gather_steps, read_training, reasons_of

PAGE = "report.html"
RULES = {"no_utility": NO_UTILITY, "little_utility": LITTLE_UTILITY, "weak_attacker": WEAK_ATTACKER}


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Config):
    """Turn a measured leakage into one page that a reader without this program can open, judge and print.

    Reads: OUTPUT/leakage.json (facemae leakage), the manifests and ledgers of the data sets it names, and a few of their images.
    Writes: OUTPUT/report.html, which needs nothing else: no network, no script, no other file. The same input gives the same bytes.
    Next: open it; before passing it on, make it again with --no-pictures.
    """

    output: str
    """The output of facemae leakage; the page goes there too."""
    pictures: bool = True
    """Show a few originals beside their reconstructions. The page is then as private as the data set."""
    num_pictures: int = 8
    """How many of them."""
    seed: int = 0
    """Chooses them, together with their keys."""
    weights: str | None = None
    """The output of the facemae train behind the protected set; the page then also tells how the weights came about."""


def run(config: ReportConfig) -> dict[str, Any]:
    """Write the page, say where it is, and return what it leads with.

    Raises:
        StoreError: leakage.json is missing, damaged or of another version, or ``weights`` is not the protected set's training.
        ValueError: a negative number of pictures.
    """
    if config.num_pictures < 0:
        raise ValueError(f"--num-pictures {config.num_pictures}: give 0 or more")
    store = open_store(config.output)
    measurement, data = read_measurement(store)
    training = read_training(config.weights, measurement.protected) if config.weights else None
    print(f"reading the manifests behind {store.url}/leakage.json", flush=True)
    steps = gather_steps(measurement, store.url)
    pictures, missing = _pictures(config, measurement, store.url)
    page = _environment().from_string(resources.files("jobs").joinpath(PAGE).read_text("utf-8"))
    html = page.render(
        m=measurement,
        steps=steps,
        reasons=list(reasons_of(steps)),
        training=training,
        pictures=pictures,
        pictures_missing=missing,
        panels=[(cmc_panels(attacker), similarity_panels(attacker, measurement.histogram)) for attacker in measurement.attackers],
        rules=RULES,
        record=json.dumps({"leakage.json": json.loads(data), "run.json": training}, indent=1, sort_keys=True),
        record_sha256=sha256_hex(data),
    )
    store.put(PAGE, html.encode("utf-8", "replace"))
    return _told(measurement, f"{store.url}/{PAGE}", shows_originals=bool(pictures))


def headline(measurement: Measurement) -> str:
    """The page's first sentence."""
    worst = measurement.worst
    curve = worst.leakage.image
    if curve is None:
        return f"No protected image could be looked for by {worst.recognizer.name}."
    traced = f"traces {count(curve.hits[0])} ({percent(curve.cmc[0])}, {interval(curve, measurement.confidence)}) to their original"
    queries = f"Of {count(curve.queries)} protected images, an attacker with {worst.recognizer.name}"
    return f"{queries} {traced}; guessing would trace {percent(curve.chance[0])}."


def percent(share: float) -> str:
    """A share for readers: two significant digits below 1 %, and never rounded up to 100 %."""
    value = 100 * share
    if value == 0 or value >= 100:
        return f"{min(value, 100):.0f} %"
    if value > 99:
        return f"{min(value, 99.99):.2f} %"
    if value >= 1:
        return f"{value:.1f} %"
    return f"{value:.2g} %" if value >= 1e-4 else f"{value:.1e} %"


def interval(curve: CurveData, confidence: float, k: int = 1) -> str:
    """The interval of CMC@k in words."""
    low, high = percent(curve.low[k - 1]).removesuffix(" %"), percent(curve.high[k - 1])
    return f"{100 * confidence:g} % interval {low} to {high}"


def count(number: int | None) -> str:
    """An integer with commas; a dash for what is not known."""
    return "–" if number is None else f"{number:,}"


def conclusion(measurement: Measurement) -> tuple[str, str]:
    """What the numbers amount to: a heading and a sentence."""
    best = max((a.kept_utility for a in measurement.attackers if a.kept_utility is not None and not a.weak), default=0.0)
    if measurement.all_weak:
        return (
            "No result: the attackers are too weak",
            f"None of these recognisers finds even {percent(WEAK_ATTACKER)} of the originals' own people: what they fail to trace is not safe.",
        )
    if measurement.utility == "unknown":
        return (
            "Utility could not be measured",
            "No identity has two images here, so nothing says whether the protected set is still worth anything. Read the leakage with that.",
        )
    kept = f"The protected images keep {percent(max(best, 0.0))} of what tells people apart in the originals."
    if measurement.utility == "none":
        return (
            "No result: the protected images are of no use",
            f"{kept} A low leakage of images that carry nothing is no protection: train longer, or hide fewer patches.",
        )
    if measurement.utility == "little":
        return "Little utility is left", f"{kept} Read the leakage with that: much of it is low because little is left to trace."
    curve = measurement.worst.leakage.image
    if curve and curve.above_chance:
        times = f"{curve.cmc[0] / curve.chance[0]:,.0f}" if curve.chance[0] else "many"
        return "Images can be traced", f"{kept} The worst attacker traces images {times} times as often as guessing: compare that with your limit."
    return "Useful, and traced no more than by guessing", f"{kept} No attacker here traces images more often than guessing, as far as this many show."


def _pictures(config: ReportConfig, measurement: Measurement, output: str) -> tuple[list[Picture], str]:
    """The pictures, and why there are none although they were asked for."""
    if not config.pictures or config.num_pictures == 0:
        return [], ""
    try:
        return choose_pictures(measurement, output, config.num_pictures, config.seed), ""
    except (*UNREADABLE, PictureError) as error:
        return [], str(error)


def _environment() -> jinja2.Environment:
    """Jinja with everything inserted escaped, and an error for every name that does not exist."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(percent=percent, count=count)
    environment.globals.update(headline=headline, conclusion=conclusion, interval=interval)
    return environment


def _told(measurement: Measurement, url: str, *, shows_originals: bool) -> dict[str, Any]:
    """Print where the page is and what it says. Returns the same."""
    title, sentence = conclusion(measurement)
    warning = " (it shows originals: keep it as safe as the data set)" if shows_originals else ""
    again = "; before passing it on: facemae report --no-pictures" if shows_originals else ""
    print(f"{headline(measurement)}\n{title}. {sentence}\nwritten: {url}{warning}\nnext:    open it in a browser{again}")
    return {"url": url, "headline": headline(measurement), "conclusion": title, "utility": measurement.utility}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    return main_of(ReportConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())

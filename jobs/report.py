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
from facemae.release import WEAK_ATTACKER
from jobs.command import Config, main_of
from jobs.report_data import LITTLE_UTILITY, NO_UTILITY, Measurement, read_measurement
from jobs.report_pictures import Picture, choose_pictures
from jobs.report_plots import cmc_panels, similarity_panels
from jobs.report_steps import UNREADABLE, gather_steps, read_training, reasons_of
from jobs.report_words import conclusion, count, headline, interval, percent

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
    rekey: str | None = None
    """For a protected set made with --rekey: the same secret, at env:NAME or file:PATH, so that pictures find their originals."""


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
        record=json.dumps({"leakage.json": _without_keys(json.loads(data)), "run.json": training}, indent=1, sort_keys=True),
        record_sha256=sha256_hex(data),
    )
    store.put(PAGE, html.encode("utf-8", "replace"))
    return _told(measurement, f"{store.url}/{PAGE}", shows_originals=bool(pictures))


def _pictures(config: ReportConfig, measurement: Measurement, output: str) -> tuple[list[Picture], str]:
    """The pictures, and why there are none although they were asked for."""
    if not config.pictures or config.num_pictures == 0:
        return [], ""
    try:
        return choose_pictures(measurement, output, config.num_pictures, config.seed, config.rekey), ""
    except (*UNREADABLE, PictureError) as error:
        return [], str(error)


def _without_keys(content: Any) -> Any:
    """The record less the keys of the most exposed images: the page may be passed on, and names no image."""
    if isinstance(content, dict):
        return {name: _without_keys(value) for name, value in content.items() if name != "most_exposed"}
    return [_without_keys(value) for value in content] if isinstance(content, list) else content


def _environment() -> jinja2.Environment:
    """Jinja with everything inserted escaped, and an error for every name that does not exist."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(percent=percent, count=count)
    environment.globals.update(headline=headline, conclusion=conclusion, interval=interval)
    return environment


def _told(measurement: Measurement, url: str, *, shows_originals: bool) -> dict[str, Any]:
    """Print where the page is and what it says. Returns the same, and what to do next."""
    title, sentence = conclusion(measurement)
    warning = " (it shows originals: keep it as safe as the data set)" if shows_originals else ""
    again = f"; before passing it on: facemae report --no-pictures --output {url.rpartition('/')[0]}" if shows_originals else ""
    print(f"{headline(measurement)}\n{title}. {sentence}\nwritten: {url}{warning}")
    next_step = f"open it in a browser{again}"
    return {"url": url, "headline": headline(measurement), "conclusion": title, "utility": measurement.utility, "next": next_step}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    return main_of(ReportConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())

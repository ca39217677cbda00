"""What ``facemae evaluate`` prints and writes as evaluate.md: its results as tables of Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from facemae.identification import RANKS


def table_of(report: Mapping[str, Any]) -> Iterator[str]:
    """The report as lines of Markdown; shares in percent."""
    pairs = [result for result in report["results"] if "accuracy" in result]
    searches = [result for result in report["results"] if "rank1" in result]
    if pairs:
        yield from _table(_pair_head(pairs), [_pair_row(result) for result in pairs])
    if pairs and searches:
        yield ""
    if searches:
        yield from _table(_search_head(searches), [_search_row(result) for result in searches])
    yield ""
    flipped = "f(x) + f(mirrored x)" if report["flip"] else "f(x), without the mirrored image"
    yield f"Shares in %. Embedding: {flipped}, of unit length. Accuracy: mean and population standard deviation over the folds."
    for protocol in report["protocols"]:
        yield from _left_out(protocol, next(result for result in report["results"] if result["protocol"] == protocol["name"]))
    for recognizer in report["recognizers"]:
        name, sha256 = recognizer["name"], recognizer["sha256"]
        yield f"{name}: sha256 {sha256[:12]}, {report['images']} images embedded in {recognizer['seconds']:.1f} s."


def _pair_head(results: Sequence[Mapping[str, Any]]) -> list[str]:
    return ["protocol", "recogniser", "pairs", "accuracy", "threshold", *[f"TAR@{far}" for far in results[0]["tar_at_far"]], "AUC", "EER"]


def _pair_row(result: Mapping[str, Any]) -> list[str]:
    folds = result["accuracy"] is not None
    accuracy = f"{percent(result['accuracy'])} ± {percent(result['std'])}" if folds else "-"
    threshold = f"{result['threshold']:.3f}" if folds else "-"
    rates = map(percent, result["tar_at_far"].values())
    counts = f"{result['genuine']} + {result['impostor']}"
    return [result["protocol"], result["recognizer"], counts, accuracy, threshold, *rates, percent(result["auc"]), percent(result["eer"])]


def _search_head(results: Sequence[Mapping[str, Any]]) -> list[str]:
    rates = [f"TPIR@{fpir}" for fpir in results[0]["tpir_at_fpir"]]
    return ["protocol", "recogniser", "probes", "gallery", *[f"rank-{k}" for k in RANKS], *rates]


def _search_row(result: Mapping[str, Any]) -> list[str]:
    gallery = f"{result['gallery']} + {result['distractors']}"
    shares = [result[f"rank{k}"] for k in RANKS] + list(result["tpir_at_fpir"].values())
    return [result["protocol"], result["recognizer"], str(result["probes"]), gallery, *map(percent, shares)]


def _left_out(protocol: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[str]:
    """What the figures of a protocol leave out."""
    name = protocol["name"]
    if protocol["images_absent"] or protocol["images_unreadable"]:
        units = [unit for unit in ("pairs", "templates") if result.get(f"{unit}_left_out")]
        lost = "".join(f", and with them {result[f'{unit}_left_out']} {unit}" for unit in units)
        yield f"{name}: left out {protocol['images_absent']} absent and {protocol['images_unreadable']} unreadable images{lost}."
    if result.get("single_image_identities"):
        yield f"{name}: {result['single_image_identities']} identities have one image; they count as distractors."
    if result.get("probes_without_mate"):
        yield f"{name}: {result['probes_without_mate']} probes are of nobody in the gallery; they count as strangers."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Markdown that reads as plain text too: columns of one width."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for number, row in enumerate([head, ["-" * width for width in widths], *rows]):
        yield (
            "| "
            + " | ".join(
                cell.ljust(w) if i < 2 or number == 1 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            + " |"
        )


def percent(share: float | None) -> str:
    """A share as a cell; "-" where there are too few pairs for it."""
    return "-" if share is None else f"{100 * share:.2f}"

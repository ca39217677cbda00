"""``facemae report``: the page tells what was measured, shows what it may, and asks nothing of any network."""

from __future__ import annotations

import base64
import html
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import facemae.model  # noqa: F401  # registers the architectures
from cluster.dataset import Dataset
from cluster.picture import decode, encode
from cluster.shard import Sample, read_samples
from cluster.store import StoreError, open_store
from facemae.masking import random_mask
from facemae.synthetic import SyntheticFaces
from jobs import ingest, leakage, protect
from jobs.report import ReportConfig, main, run
from jobs.report_data import Measurement, read_measurement
from jobs.report_plots import cmc_panels
from jobs.report_words import conclusion, headline, percent
from tests.jobs.test_leakage_job import write_recognizer
from tests.training import initial

PLACE = b"48.8584 N 2.2945 E"
"""Stands in the EXIF of every original."""
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
Edit = Callable[[dict[str, Any]], None]


def write_faces(folder: Path) -> None:
    """6 identities x 4 images as JPEGs with EXIF, and three files that are no faces."""
    faces = SyntheticFaces(6, 4, seed=3)
    exif = Image.Exif()
    exif[0x010E] = PLACE.decode()
    for index, picture in enumerate(faces.render(np.arange(24))):
        path = folder / f"person{index // 4}" / f"secret-{index:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path, quality=95, exif=exif)
    (folder / "person0" / "secret-text.jpg").write_text("no picture")
    (folder / "person1" / "secret-empty.jpg").touch()
    (folder / "person2" / "secret-nothing.jpg").touch()


@pytest.fixture(scope="module")
def measured(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A leakage folder: originals from files, protected by an untrained FaceMAE, a toy attacker twice."""
    root = tmp_path_factory.mktemp("measured")
    write_faces(root / "faces")
    original, protected, weights = str(root / "original"), str(root / "protected"), str(root / "weights")
    initial().save_pretrained(weights)
    ingest.run(ingest.IngestConfig(source=str(root / "faces"), output=original, shard_size=10, num_workers=1))
    protect.run(protect.ProtectConfig(input=original, output=protected, weights=weights, seed=5, mask_ratio=0.6, num_workers=1))
    recognizer, output = [str(write_recognizer(root / "alpha.onnx", 0))], root / "leakage"
    leakage.run(
        leakage.LeakageConfig(
            original=original, protected=protected, recognizer=recognizer, pixels=False, output=str(output), num_workers=1
        )
    )
    for folder in (root / "original" / "embeddings", root / "protected" / "embeddings", output):
        shutil.copytree(folder / "alpha", folder / "beta")  # a second attacker without the time that it takes
    content = json.loads((output / "leakage.json").read_text())
    beta = json.loads(json.dumps(content["attackers"][0]).replace("alpha", "beta"))
    (output / "leakage.json").write_text(json.dumps({**content, "attackers": [*content["attackers"], beta]}))
    return output


@pytest.fixture
def edited(measured: Path, tmp_path: Path) -> Callable[[Edit], Path]:
    """A copy of the leakage folder with leakage.json changed."""

    def edit(change: Edit) -> Path:
        folder = tmp_path / "leakage"
        shutil.copytree(measured, folder)
        content = json.loads((folder / "leakage.json").read_text())
        change(content)
        (folder / "leakage.json").write_text(json.dumps(content))
        return folder

    return edit


@pytest.fixture(scope="module")
def page(measured: Path) -> str:
    run(ReportConfig(output=str(measured), num_pictures=24))
    return (measured / "report.html").read_text()


def render(folder: Path, **options: Any) -> str:
    run(ReportConfig(output=str(folder), **options))
    return (folder / "report.html").read_text()


def text_of(page: str) -> str:
    """The words a reader sees, in one line."""
    body = re.sub(r"<(style|svg|pre)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", body)))


def samples_of(root: Path) -> dict[str, Sample]:
    dataset = Dataset(str(root))
    items = [item for manifest in dataset.manifests() for item in read_samples(dataset.read(manifest))]
    return {item.key: item for item in items if isinstance(item, Sample)}


def pictures_of(page: str) -> list[tuple[str, dict[str, bytes]]]:
    """Key and JPEG bytes by kind of every figure of faces."""
    found = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)" alt="(\w+) ([^"]+)"', page)
    keys = dict.fromkeys(key for _, _, key in found)
    return [(key, {kind: base64.b64decode(data) for data, kind, other in found if other == key}) for key in keys]


def test_the_page_tells_the_numbers(measured: Path, page: str) -> None:
    report, text = json.loads((measured / "leakage.json").read_text()), text_of(page)
    worst = report["attackers"][0]
    image = worst["leakage"]["image"]
    assert f"Of 24 protected images, an attacker with {worst['recognizer']['name']} traces {image['hits'][0]} (" in text
    assert "guessing would trace 4.2 %." in text
    for attacker in report["attackers"]:
        for curve in (attacker["leakage"]["image"], attacker["leakage"]["identity"], attacker["utility"]["identity"]):
            for k in (1, 5, 10):
                share, low, high = (percent(curve[end][k - 1]) for end in ("cmc", "low", "high"))
                assert f"{share} {low} \N{EN DASH} {high}" in text
        assert attacker["recognizer"]["sha256"] in text
    for value in ("fingerprint", "samples"):
        assert str(report["protected"][value]) in text
    assert report["protected"]["config"]["protection"]["weights_sha256"] in text
    assert page.count("<svg") == 2 * (2 + 3), "for each attacker two CMC diagrams and three of similarities"
    assert "The faces are drawn" not in text


def test_every_image_is_accounted_for_by_reasons_alone(page: str) -> None:
    text = text_of(page)
    assert "ingest 27 24 3 3 yes" in text
    assert "protect 24 24 0 3 yes" in text
    assert "ingest empty-file 2 ingest not-an-image 1" in text
    assert "search protected → original, alpha 24 24 0 3 yes" in text
    assert re.search(r"protect [\d.]+ s [\d.]+ s [\d.]+ s \d+", text), "seconds and images/s"
    assert "secret-" not in page, "no source path leaves the ledger"


def test_accounting_that_does_not_add_up_is_said(measured: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(measured.parent, root)
    path = root / "protected" / "manifests" / "00001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "samples": 5}))
    content = (root / "leakage" / "leakage.json").read_text().replace(str(measured.parent), str(root))
    (root / "leakage" / "leakage.json").write_text(content)
    text = text_of(render(root / "leakage", pictures=False))
    assert "protect 24 20 0 3 NO" in text
    assert "ingest 27 24 3 3 yes" in text


def test_the_page_needs_no_network(page: str) -> None:
    assert not re.search(r"https?://|ftp://|@import|<script|<link(?! rel=\"icon\" href=\"data:,\")|<iframe|srcset", page)
    addresses = re.findall(r"(?:src|href|xlink:href)=\"([^\"]*)\"", page) + re.findall(r"url\(([^)]*)\)", page)
    assert len(addresses) > 24
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert "default-src 'none'; img-src data:" in page


def test_pictures_are_original_masked_and_protected(measured: Path, page: str) -> None:
    originals, protected = samples_of(measured.parent / "original"), samples_of(measured.parent / "protected")
    pictures = pictures_of(page)
    assert {key for key, _ in pictures} == set(originals), "24 were asked for"
    assert len({originals[key].identity for key, _ in pictures[:3]}) == 3
    for key, shown in pictures:
        picture = decode(originals[key].image)
        assert shown["original"] == encode(picture)
        assert shown["protected"] == bytes(protected[key].image)
        visible = set(random_mask([key], 49, 0.6, 5)[0].tolist())
        masked = decode(shown["masked"]).astype(int)
        for patch in range(49):
            rows, columns = slice(patch // 7 * 16, patch // 7 * 16 + 16), slice(patch % 7 * 16, patch % 7 * 16 + 16)
            expected = picture[rows, columns].astype(int) if patch in visible else np.full((16, 16, 3), 128)
            assert np.abs(masked[rows, columns] - expected).mean() < 4, "JPEG rounding apart"
    assert "keep it as safe as the data set" in text_of(page)


def test_an_originals_metadata_stays_behind(measured: Path, page: str) -> None:
    assert PLACE in bytes(next(iter(samples_of(measured.parent / "original").values())).image), "the data set keeps the file's bytes"
    assert all(PLACE not in data for _, shown in pictures_of(page) for data in shown.values())


def test_captions_tell_the_worst_attackers_ranks(measured: Path, page: str) -> None:
    hits = json.loads((measured / "leakage.json").read_text())["attackers"][0]["leakage"]["image"]["hits"]
    text = text_of(page)
    assert text.count("traced: nearest of all") == hits[0]
    assert len(re.findall(r"found at rank (?:[2-9]|10)\b", text)) == hits[9] - hits[0]
    assert len(re.findall(r"found at rank (?!1\b)\d+", text)) == 24 - hits[0]


def test_no_pictures_leaves_no_pixel(measured: Path, page: str) -> None:
    assert main(["--output", str(measured), "--no-pictures"]) == 0
    bare = (measured / "report.html").read_bytes()
    assert b"<img" not in bare
    assert b"data:image" not in bare
    assert b"shows originals" not in bare

    def pieces(data: bytes) -> list[bytes]:
        """What of a file would be found whatever it is wrapped in: the bytes, and base64 at each of its three phases."""
        coded = [base64.b64encode(data[300 + phase :])[4:44] for phase in range(3)]
        return [data[300:330], *coded]

    files = []
    for root in ("original", "protected"):
        for sample in samples_of(measured.parent / root).values():
            files += [bytes(sample.image), encode(decode(sample.image))]
    assert not [piece for file in files for piece in pieces(file) if piece in bare]
    assert any(piece in page.encode() for file in files for piece in pieces(file)), "this search finds what the other page shows"


def test_the_page_names_no_exposed_image(measured: Path) -> None:
    exposed = json.loads((measured / "leakage.json").read_text())["attackers"][0]["leakage"]["most_exposed"]
    assert exposed
    assert not [row["key"] for row in exposed if row["key"] in render(measured, pictures=False)]


def test_linking_is_told(edited: Callable[[Edit], Path]) -> None:
    rows = [{"far": 0.1, "tar": 0.625, "threshold": 0.2}, {"far": 0.01, "tar": None, "threshold": None, "reason": "too few"}]

    def change(content: dict[str, Any]) -> None:
        for attacker in content["attackers"]:
            attacker["leakage"]["linking"] = rows

    text = text_of(render(edited(change), pictures=False))
    assert "Attacker at 10.0 % wrong at 1.0 % wrong alpha 62.5 % \N{EN DASH} beta 62.5 % \N{EN DASH}" in text


def test_an_approximate_search_is_an_upper_bound(edited: Callable[[Edit], Path], page: str) -> None:
    bounds = {"queries": 2000, "hits": 200, "exact_hits": 180, "bounds": {"low": 0.0725, "high": 0.125}}

    def change(content: dict[str, Any]) -> None:
        content["search"] = "IVF64,SQfp16"
        content["attackers"][0]["leakage"]["sample"] = {"queries": 2000, "recall_at_1": 0.97, "image": bounds, "identity": None}

    text = text_of(render(edited(change), pictures=False))
    assert "traces at most" in text
    assert "every share here is an upper bound" in text
    assert "Of 2,000 random images that were searched exactly too, 180 are traced, not 200: " in text
    assert "by alpha 7.2 % to 12.5 % are traced in truth." in text
    assert "traces at most" not in text_of(page)


def test_a_curve_of_other_depths_is_refused(edited: Callable[[Edit], Path]) -> None:
    def change(content: dict[str, Any]) -> None:
        content["attackers"][0]["leakage"]["image"]["depths"][4] = 17

    with pytest.raises(StoreError, match="they start with 1 to 10 and grow"):
        render(edited(change))


def test_a_few_pictures_are_chosen_by_seed(measured: Path) -> None:
    first, again, other = (pictures_of(render(measured, num_pictures=6, seed=seed)) for seed in (1, 1, 2))
    assert len(first) == 6
    assert first == again
    assert [key for key, _ in first] != [key for key, _ in other]
    assert len({key.split("-")[0] for key, _ in first}) == 3, "from all three shards"


def test_the_same_input_gives_the_same_bytes(measured: Path) -> None:
    assert render(measured) == render(measured)


def test_drawn_faces_are_said_to_be_drawn(edited: Callable[[Edit], Path]) -> None:
    text = text_of(render(edited(lambda content: content["original"]["config"].update(source="synthetic"))))
    assert "The faces are drawn by a program; no real person is in them." in text
    assert "say nothing about real faces" in text


def test_what_is_inserted_is_escaped(edited: Callable[[Edit], Path]) -> None:
    name = "<script>alert('$x$')</script>"

    def change(content: dict[str, Any]) -> None:
        content["attackers"][0]["name"] = name
        content["original"]["url"] += "/</pre><img src=x>"

    page = render(edited(change))
    assert "<script" not in page
    assert "<img src=x" not in page
    assert name in text_of(page)


@pytest.mark.parametrize("role", ["original", "protected"])
def test_a_root_that_is_gone_costs_its_pictures_and_no_number(edited: Callable[[Edit], Path], tmp_path: Path, role: str) -> None:
    gone = str(tmp_path / "gone")
    page = render(edited(lambda content: content[role].update(url=gone)))
    text, step = text_of(page), {"original": "ingest 27 24 3", "protected": "protect 24 24 0"}[role]
    assert f"No pictures: {gone} holds no data set" in text
    assert f"{step} 3 unknown" in text
    assert "Of 24 protected images" in text
    assert "<img" not in page
    assert "shows originals" not in text


def test_a_set_made_anew_is_not_shown(edited: Callable[[Edit], Path]) -> None:
    page = render(edited(lambda content: content["protected"].update(fingerprint="0" * 64)))
    assert "was made anew since it was measured" in text_of(page)
    assert "<img" not in page


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "does not exist: run `facemae leakage"),
        ("{", "is no JSON"),
        ('{"schema": 0, "kind": "leakage"}', "schema 0, this version reads 'leakage' of schema 2"),
        ("[]", "schema None"),
        ('{"schema": 2, "kind": "leakage"}', "search: "),
    ],
)
def test_a_folder_without_a_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "leakage.json").write_text(content)
    assert main(["--output", str(tmp_path)]) == 2
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert reason in shown
    assert "facemae leakage" in shown
    assert str(tmp_path) in shown
    assert not (tmp_path / "report.html").exists()


def test_the_training_is_told(measured: Path, tmp_path: Path) -> None:
    report = json.loads((measured / "leakage.json").read_text())
    sha256 = report["protected"]["config"]["protection"]["weights_sha256"]
    attacker = report["attackers"][1]["recognizer"]
    content = {
        "samples": 123_456,
        "steps": 99,
        "weights": {"sha256": sha256},
        "recognizer": attacker,
        "parent": {"url": "training-set", "fingerprint": "f" * 64},
        "config": {"architecture": "facemae_tiny_patch16_112", "loss.relation": 1.0},
    }
    (tmp_path / "run.json").write_text(json.dumps(content))
    text = text_of(render(measured, pictures=False, weights=str(tmp_path)))
    assert "Training of the protection , on other images root" in text
    assert "123456" in text
    assert f"{attacker['name']} sits in the loss" in text
    (tmp_path / "run.json").write_text(json.dumps({**content, "weights": {"sha256": "0" * 64}}))
    with pytest.raises(StoreError, match="give its own training"):
        render(measured, weights=str(tmp_path))
    with pytest.raises(StoreError, match="holds no run"):
        render(measured, weights=str(tmp_path / "nothing"))


def measurement(folder: Path, *, leak: float, utility: float, reference: float, queries: int = 1000) -> Measurement:
    """The folder's measurement with other CMC@1 of the identity for every attacker; ``leak`` also for the image. Chance is 0.01."""
    found, _ = read_measurement(open_store(str(folder)))
    for attacker in found.attackers:
        for search, share in ((attacker.leakage, leak), (attacker.utility, utility), (attacker.reference, reference)):
            for curve in (search.image, search.identity):
                if curve is not None:
                    curve.cmc[0], curve.chance[0], curve.hits[0] = share, 0.01, round(share * queries)
                    half = 2 * math.sqrt(share * (1 - share) / queries)
                    curve.low[0], curve.high[0] = share - half, share + half
    return found


@pytest.mark.parametrize(
    ("leak", "utility", "reference", "title", "sentence"),
    [
        (0.01, 0.03, 0.99, "No result: the protected images are of no use", "2.0 %"),
        (0.01, 0.30, 0.99, "Little utility is left", "29.6 %"),
        (0.01, 0.90, 0.99, "Useful, and traced no more than by guessing", "No attacker here traces them"),
        (0.05, 0.90, 0.99, "Protected images can be traced", "the very image is found 5.0 times"),
        (0.99, 0.99, 0.99, "Protected images can be traced", "99 times"),
        (0.01, 0.01, 0.40, "No result: the attackers are too weak", "50 %"),
    ],
)
def test_what_the_numbers_amount_to(measured: Path, leak: float, utility: float, reference: float, title: str, sentence: str) -> None:
    told = conclusion(measurement(measured, leak=leak, utility=utility, reference=reference))
    assert told[0] == title
    assert sentence in told[1]


def test_no_use_is_on_the_page(edited: Callable[[Edit], Path]) -> None:
    def change(content: dict[str, Any]) -> None:
        for attacker in content["attackers"]:
            attacker["reference"]["identity"]["cmc"][0] = 0.9
            attacker["utility"]["identity"]["cmc"] = attacker["utility"]["identity"]["chance"]

    text = text_of(render(edited(change), pictures=False))
    assert "No result: the protected images are of no use. The protected images keep 0 %" in text
    assert "keeps less than 10 % of the utility is of no use" in text


def test_identities_of_one_image_have_no_utility(edited: Callable[[Edit], Path]) -> None:
    def change(content: dict[str, Any]) -> None:
        for attacker in content["attackers"]:
            for search in ("leakage", "reference", "utility"):
                attacker[search]["identity"] = None

    text = text_of(render(edited(change)))
    assert "Utility could not be measured" in text
    assert "Not measurable here: no identity has two images." in text


def test_one_traced_image_is_one(measured: Path) -> None:
    assert "traces 1 (0.10 %" not in headline(measurement(measured, leak=0.02, utility=0.5, reference=1.0))
    assert "to its original; guessing would trace 1.0 %." in headline(measurement(measured, leak=0.001, utility=0.5, reference=1.0))


def test_the_axis_holds_any_gallery(measured: Path) -> None:
    found = measurement(measured, leak=0.0, utility=0.5, reference=1.0)
    worst = found.worst
    assert worst.leakage.image is not None
    worst.leakage.image.chance[0] = 1 / 260_000_000
    image, _ = cmc_panels(worst)
    assert "0.000001 %" in image.svg
    assert "nan" not in image.svg
    assert "#0101" not in image.svg, "every colour is the page's own"


@given(st.floats(0, 1))
def test_percent_neither_hides_nor_invents(share: float) -> None:
    shown = float(percent(share).removesuffix(" %"))
    assert (shown == 100) == (share * 100 >= 100)
    assert (shown == 0) == (share * 100 == 0)
    assert shown == pytest.approx(100 * share, rel=0.06, abs=1e-300)


@pytest.mark.s3
def test_the_page_goes_where_the_measurement_is(measured: Path, s3_root: str, capsys: pytest.CaptureFixture[str]) -> None:
    store = open_store(s3_root)
    store.put("leakage.json", (measured / "leakage.json").read_bytes())
    assert main(["--output", s3_root, "--no-pictures"]) == 0
    assert f"written: {s3_root}/report.html\n" in capsys.readouterr().out
    assert "Of 24 protected images" in store.get("report.html").decode()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome is installed")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it(measured: Path, tmp_path: Path, scheme: str) -> None:
    page, shot = tmp_path / "report.html", tmp_path / "shot.png"
    page.write_text(render(measured))
    quiet = ["first-run", "sandbox", "proxy-server"]
    off = ["gpu", "quic", "background-networking", "component-update", "sync", "dev-shm-usage"]
    flags = ["--headless", *(f"--no-{name}" for name in quiet), *(f"--disable-{name}" for name in off), f"--user-data-dir={tmp_path}/user"]
    flags += ["--hide-scrollbars", "--window-size=1000,3000", f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"]

    def browse(*arguments: str) -> str:
        command = [str(CHROMIUM), *flags, *arguments, page.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    dom = browse("--dump-dom")
    assert "Of 24 protected images" in text_of(dom)
    assert len(re.findall(r"<img ", dom)) == 3 * 8
    assert not re.search(r"https?://", dom)
    browse(f"--screenshot={shot}")
    pixels = np.asarray(Image.open(shot).convert("L")).astype(int)
    assert pixels.std() > 15, "not blank"
    assert (np.median(pixels) > 128) == (scheme == "light")


def test_other_protections_stand_in_a_table_with_this_one(edited: Callable[[Edit], Path]) -> None:
    ends = {"cmc": 0.125, "low": 0.0625, "high": 0.25}
    attacker = {"name": "alpha", "image": ends, "identity": None, "utility": {**ends, "cmc": 0.75}}

    def change(content: dict[str, Any]) -> None:
        content["beside"] = [{"url": "s3://b/blurred", "sha256": "0" * 64, "protection": {"method": "<blur>"}, "attackers": [attacker]}]

    text = text_of(render(edited(change), pictures=False))
    assert "Beside other protections" in text
    assert re.search(r"<blur> alpha 12\.5 % 6\.2 % \S 25\.0 % \S 75\.0 %", text), text
    assert "facemae (this page) alpha" in text


def test_alone_there_is_no_such_table(page: str) -> None:
    assert "Beside other protections" not in page

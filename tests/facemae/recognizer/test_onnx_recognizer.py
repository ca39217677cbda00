from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from facemae.recognizer.onnx import OnnxRecognizer
from tests.facemae.recognizer.graphs import graph_file, mean_colour

HALF = (0.5, 0.5, 0.5)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_embed_against_the_torch_network(compact_net, compact_file, noise_pictures):
    recognizer = OnnxRecognizer.load(compact_file)
    normalised = (noise_pictures / 255.0 - np.array([0.5, 0.4, 0.3])) / np.array([0.5, 0.25, 0.2])
    with torch.no_grad():
        expected = compact_net(torch.from_numpy(normalised.transpose(0, 3, 1, 2)).float()).numpy()
    np.testing.assert_allclose(recognizer.features(noise_pictures), expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    rows = recognizer.embed(noise_pictures)
    assert (rows.dtype, rows.shape) == (np.float32, (21, 32))
    np.testing.assert_allclose(rows, expected, atol=1e-5)


@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_a_row_is_the_same_bits_in_any_batch(data, compact_file, noise_pictures):
    recognizer = OnnxRecognizer.load(compact_file, threads=data.draw(st.integers(1, 3)))
    order = data.draw(st.lists(st.integers(0, len(noise_pictures) - 1), min_size=1, max_size=30))
    alone = np.concatenate([recognizer.embed(noise_pictures[index : index + 1]) for index in order])
    np.testing.assert_array_equal(recognizer.embed(noise_pictures[order]), alone)


def test_pickle_carries_the_network(compact_file, noise_pictures, tmp_path):
    moved = tmp_path / "moved.onnx"
    shutil.copy(compact_file, moved)
    recognizer = OnnxRecognizer.load(moved, HALF, HALF, name="other")
    state = pickle.dumps(recognizer)
    moved.unlink()
    copy = pickle.loads(state)
    assert copy.describe() == recognizer.describe()
    np.testing.assert_array_equal(copy.embed(noise_pictures), recognizer.embed(noise_pictures))


def test_describe_records_what_the_embedding_depends_on(compact_file):
    import hashlib

    assert OnnxRecognizer.load(compact_file).describe() == {
        "name": "compact",
        "sha256": hashlib.sha256(compact_file.read_bytes()).hexdigest(),
        "dim": 32,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.5, 0.25, 0.2],
    }


def test_no_pictures_give_no_rows(compact_file):
    rows = OnnxRecognizer.load(compact_file).embed(np.empty((0, 112, 112, 3), np.uint8))
    assert rows.shape == (0, 32)


@pytest.mark.parametrize("shape", [(112, 112, 3), (2, 3, 112, 112), (2, 96, 96, 3)])
def test_other_shapes_are_refused(compact_file, shape):
    with pytest.raises(ValueError, match=r"compact: pictures must be uint8 \(N, 112, 112, 3\)"):
        OnnxRecognizer.load(compact_file).embed(np.zeros(shape, np.uint8))


def test_float_pictures_are_refused(compact_file):
    with pytest.raises(ValueError, match="not float32"):
        OnnxRecognizer.load(compact_file).embed(np.zeros((1, 112, 112, 3), np.float32))


def test_arguments_go_before_the_sidecar(compact_file):
    recognizer = OnnxRecognizer.load(compact_file, std=IMAGENET[1], name="mine")
    assert (recognizer.name, recognizer.mean, recognizer.std) == ("mine", (0.5, 0.4, 0.3), IMAGENET[1])


def test_normalisation_is_never_guessed(compact_file, tmp_path):
    path = tmp_path / "bare.onnx"
    shutil.copy(compact_file, path)
    for given_half in ({}, {"mean": HALF}, {"std": HALF}):
        with pytest.raises(ValueError, match=r"bare\.onnx: .*never guessed.*mean and std.*bare\.json"):
            OnnxRecognizer.load(path, **given_half)
    assert OnnxRecognizer.load(path, HALF, HALF).name == "bare"


@pytest.mark.parametrize(
    ("mean", "std"),
    [((127.5,) * 3, HALF), (HALF, (0.0, 0.5, 0.5)), (HALF, (0.5, 0.5)), (0.5, HALF), ((float("nan"),) * 3, HALF)],
)
def test_impossible_normalisations_are_refused(compact_file, mean, std):
    with pytest.raises(ValueError, match=r"compact\.onnx: (mean|std) must be three floats"):
        OnnxRecognizer.load(compact_file, mean, std)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "not valid JSON"), ("[1]", "must hold an object"), (json.dumps({"sha256": "00"}), "describes another file")],
)
def test_broken_sidecars_are_refused(compact_file, tmp_path, text, reason):
    path = tmp_path / "copy.onnx"
    shutil.copy(compact_file, path)
    path.with_suffix(".json").write_text(text)
    with pytest.raises(ValueError, match=rf"copy\.json.*{reason}"):
        OnnxRecognizer.load(path, HALF, HALF)


def _flat(shape):
    constant = helper.make_node("Constant", [], ["shape"], value=helper.make_tensor("s", TensorProto.INT64, [2], shape))
    return [constant, helper.make_node("Reshape", ["pooled", "shape"], ["embedding"])]


POOL = mean_colour("flat")[:1]
TWICE = [helper.make_node("Identity", ["embedding"], ["second"])]
REFUSED = {
    "one picture a call": ({"nodes": mean_colour(), "input_shape": (1, 3, 112, 112)}, "N left open"),
    "other size": ({"nodes": mean_colour(), "input_shape": ("n", 3, 224, 224)}, r"3 x 112 x 112.*224"),
    "channels last": ({"nodes": mean_colour(), "input_shape": ("n", 112, 112, 3)}, "3 x 112 x 112"),
    "half precision": ({"nodes": mean_colour(), "input_type": TensorProto.DOUBLE}, "not an ONNX network|float32"),
    "two outputs": ({"nodes": mean_colour() + TWICE, "outputs": ("embedding", "second")}, "is it a detector"),
    "a map, not a row": ({"nodes": POOL, "outputs": ("pooled",)}, r"must give \(8, dim\)"),
    "rows run together": ({"nodes": POOL + _flat([1, -1])}, r"must give \(8, dim\).*\(1, 24\)"),
    "fixed rows": ({"nodes": POOL + _flat([2, 3])}, "fails on 8 pictures"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_are_no_recogniser_are_refused(tmp_path, case):
    arguments, reason = REFUSED[case]
    path = graph_file(tmp_path / "wrong.onnx", **arguments)
    with pytest.raises(ValueError, match=rf"(?s)wrong\.onnx: .*({reason})"):
        OnnxRecognizer.load(path, HALF, HALF)


@pytest.mark.parametrize("content", [b"", b"not a network", b"PK\x03\x04" + bytes(100)])
def test_unreadable_files_are_refused(tmp_path, content):
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.onnx: not an ONNX network"):
        OnnxRecognizer.load(path, HALF, HALF)
    with pytest.raises(FileNotFoundError, match=r"absent\.onnx: there is no such recogniser: give the path"):
        OnnxRecognizer.load(tmp_path / "absent.onnx", HALF, HALF)


def test_weights_in_another_file_are_refused(compact_file, tmp_path):
    path = tmp_path / "outside.onnx"
    model = onnx.load(compact_file)
    onnx.save(model, path, save_as_external_data=True, location="outside.data", size_threshold=0)
    with pytest.raises(ValueError, match=r"outside\.onnx: .*another file"):
        OnnxRecognizer.load(path, HALF, HALF)


@pytest.mark.parametrize("tail", ["Identity", "Log"])  # a black picture: zero, minus infinity
def test_an_embedding_without_direction_names_its_row(tmp_path, tail):
    nodes = [*mean_colour("colour"), helper.make_node(tail, ["colour"], ["embedding"])]
    recognizer = OnnxRecognizer.load(graph_file(tmp_path / "colour.onnx", nodes), (0, 0, 0), (1, 1, 1))
    pictures = np.full((12, 112, 112, 3), 100, np.uint8)
    np.testing.assert_allclose(np.abs(recognizer.embed(pictures)), 1 / np.sqrt(3), rtol=1e-5)
    pictures[[9, 11]] = 0
    with pytest.raises(ValueError, match=r"colour: .*picture 9, 11 of this batch of 12"):
        recognizer.embed(pictures)


def test_devices(compact_file):
    assert OnnxRecognizer.load(compact_file, device="auto").device in ("cpu", "cuda")
    with pytest.raises(ValueError, match=r"'tpu'.*cpu, cuda or auto"):
        OnnxRecognizer.load(compact_file, device="tpu")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(ValueError, match="onnxruntime-gpu"):
            OnnxRecognizer.load(compact_file, device="cuda")


REAL = {"mobilefacenet_ms1m": IMAGENET, "edgeface_xxs": (HALF, HALF)}


@pytest.mark.faces
@pytest.mark.parametrize("name", REAL)
def test_real_recognisers_tell_people_apart_in_any_batch(name, shared_folder, face_pictures):
    recognizer = OnnxRecognizer.load(shared_folder / "models" / f"{name}.onnx", *REAL[name], threads=2)
    rows = recognizer.embed(face_pictures)
    order = np.random.default_rng(0).permutation(len(face_pictures))
    np.testing.assert_array_equal(recognizer.embed(face_pictures[order]), rows[order])
    alone = np.concatenate([recognizer.embed(face_pictures[i : i + 3]) for i in range(0, len(face_pictures), 3)])
    np.testing.assert_array_equal(alone, rows)
    same = np.sum(rows[::2] * rows[1::2], axis=1)
    different = (rows[::2] @ rows[1::2].T)[~np.eye(20, dtype=bool)]
    assert same.mean() > 0.5
    assert abs(different.mean()) < 0.1
    # The published threshold: 0.24 to 0.28.
    assert np.mean(same > 0.26) >= 0.9
    assert np.mean(different < 0.26) >= 0.98


@pytest.mark.faces
def test_a_detector_is_refused(shared_folder):
    with pytest.raises(ValueError, match="is it a detector"):
        OnnxRecognizer.load(shared_folder / "models" / "yunet_n_dynamic.onnx", HALF, HALF)

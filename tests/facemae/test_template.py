"""Templates: means of media, means of templates, and lists that contradict themselves."""

from __future__ import annotations

import numpy as np
import pytest

from facemae.pairs import PairListError
from facemae.table import TableError
from facemae.template import Templates, read_template_names, read_template_pairs, read_templates
from facemae.verification import VerificationError, unit_rows

LIST = """template,subject,image,media
t1,anna,a/1.jpg,video
t1,anna,a/2.jpg,video
t1,anna,a/3.jpg,
t2,ben,b/1.jpg,video
t2,ben,a/3.jpg,
t3,anna,a/3.jpg,still
"""


def test_a_list_is_read() -> None:
    templates = read_templates(LIST, "list")
    assert templates.names == ["t1", "t2", "t3"]
    assert templates.subjects == ["anna", "ben", "anna"]
    assert templates.images == ["a/1.jpg", "a/2.jpg", "a/3.jpg", "b/1.jpg"]
    assert templates.template.tolist() == [0, 0, 1, 1, 2], "media of one name in two templates are two"
    assert templates.medium.tolist() == [0, 0, 1, 2, 3, 4]


def test_pooling_equals_means_of_means() -> None:
    random = np.random.default_rng(0)
    names = [f"t{random.integers(8)}" for _ in range(60)]
    media = [f"m{random.integers(3)}" if random.random() < 0.7 else "" for _ in names]
    images = [f"i{random.integers(25)}.jpg" for _ in names]
    rows = list(zip(names, names, images, media, strict=True))
    templates = read_templates("template,subject,image,media\n" + "\n".join(map(",".join, rows)), "list")
    vectors = unit_rows(random.standard_normal((len(templates.images), 6)))
    by_name = dict(zip(templates.images, vectors.astype(np.float64), strict=True))
    found, full = templates.pool(vectors, np.ones(len(vectors), bool))
    assert full.all()
    for number, name in enumerate(templates.names):
        groups = dict[str, list[np.ndarray]]()
        for row, (template, _, image, medium) in enumerate(rows):
            if template == name:
                groups.setdefault(medium or f"row {row}", []).append(by_name[image])
        mean = np.mean([np.mean(group, 0) for group in groups.values()], 0)
        np.testing.assert_allclose(found[number], mean / np.linalg.norm(mean), atol=1e-6)


def test_a_video_weighs_as_much_as_a_still() -> None:
    text = "template,subject,image,media\n" + "".join(f"t,s,{i}.jpg,video\n" for i in range(9)) + "t,s,still.jpg,\n"
    vectors = np.array([[1.0, 0]] * 9 + [[0, 1]], np.float32)
    found, _ = read_templates(text, "list").pool(vectors, np.ones(10, bool))
    np.testing.assert_allclose(found, [[0.5**0.5, 0.5**0.5]], rtol=1e-6)


def test_absent_images_leave_the_template_to_the_others() -> None:
    templates = read_templates(LIST, "list")
    vectors = np.eye(4, dtype=np.float32)
    found, full = templates.pool(vectors, np.array([True, False, False, True]))
    assert full.tolist() == [True, True, False]
    np.testing.assert_array_equal(found, [[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])


def test_images_that_cancel_each_other_out_are_refused() -> None:
    templates = read_templates("template,subject,image\nt,s,a.jpg\nt,s,b.jpg\n", "list")
    with pytest.raises(VerificationError, match="template embeddings are zero or not finite"):
        templates.pool(np.array([[1.0, 0], [-1, 0]], np.float32), np.ones(2, bool))
    with pytest.raises(VerificationError, match="not finite"):
        templates.pool(np.array([[1.0, 0], [np.nan, 0]], np.float32), np.ones(2, bool))


@pytest.fixture
def templates() -> Templates:
    return read_templates(LIST, "list")


def test_pairs_and_galleries_of_templates(templates: Templates) -> None:
    left, right, same = read_template_pairs("t1,t2,same\nt1,t3,1\nt2,t3,0\n", "pairs", templates)
    assert (left.tolist(), right.tolist(), same.tolist()) == ([0, 1], [2, 2], [True, False])
    assert read_template_names("template\nt3\nt2\n", "gallery", templates).tolist() == [2, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("template,subject\nt,s\n", "needs the columns template,subject,image"),
        ("", "needs the columns"),
        ("template,subject,image\n", "holds no row"),
        ("template,subject,image\nt,s,\n", "line 2: template, subject, image must not be empty"),
        ("template,subject,image\nt,s,a.jpg\nt,other,b.jpg\n", "line 3: template 't' is of 's' and of 'other'"),
        ("template,subject,image\nt,s,../a.jpg\n", "without '..'"),
    ],
)
def test_a_list_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises((PairListError, TableError)) as caught:
        read_templates(text, "list")
    assert message in str(caught.value)


def test_lists_that_contradict_the_templates(templates: Templates) -> None:
    with pytest.raises(PairListError, match="line 2 names the template 't9'"):
        read_template_pairs("t1,t2,same\nt1,t9,1\n", "pairs", templates)
    with pytest.raises(PairListError, match="say otherwise"):
        read_template_pairs("t1,t2,same\nt1,t2,1\n", "pairs", templates)
    with pytest.raises(PairListError, match="must be 1 or 0"):
        read_template_pairs("t1,t2,same\nt1,t2,maybe\n", "pairs", templates)
    with pytest.raises(PairListError, match="twice"):
        read_template_names("template\nt1\nt1\n", "gallery", templates)

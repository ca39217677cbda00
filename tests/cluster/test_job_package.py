from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cluster.job_package import CONFIG, package_files, write_package

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Packages with all that may lie beside modules."""
    for package in ("facemae", "cluster", "jobs"):
        (tmp_path / package / "__pycache__").mkdir(parents=True)
        (tmp_path / package / ".secrets").mkdir()
        (tmp_path / package / "inner").mkdir()
        for name in ("a.py", "inner/b.py", "page.html", "rates.yaml", "__pycache__/a.cpython-311.pyc", "__pycache__/c.py"):
            (tmp_path / package / name).write_text("x")
        for name in (".secrets/key.py", ".env.yaml", "token", "faces.tar", "model.onnx", "aws.ini", "a.py~"):
            (tmp_path / package / name).write_text("SECRET")
    (tmp_path / "outside.py").write_text("SECRET")
    (tmp_path / "jobs" / "link.py").symlink_to(tmp_path / "outside.py")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.py").write_text("SECRET")
    (tmp_path / "jobs" / "linked").symlink_to(tmp_path / "elsewhere")
    return tmp_path


def test_modules_and_what_they_read_travel_and_nothing_else(tree: Path) -> None:
    names = package_files("a: 1\n", root=tree)
    expected = {
        f"{package}/{name}" for package in ("facemae", "cluster", "jobs") for name in ("a.py", "inner/b.py", "page.html", "rates.yaml")
    }
    assert set(names) == expected | {CONFIG}
    assert b"SECRET" not in names.values()


def test_the_same_content_is_the_same_package(tree: Path, tmp_path: Path) -> None:
    first, second, other = (tmp_path / f"{name}.zip" for name in ("first", "second", "other"))
    size = write_package(first, "a: 1\n", root=tree)
    (tree / "jobs" / "a.py").touch()
    write_package(second, "a: 1\n", root=tree)
    write_package(other, "a: 2\n", root=tree)
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()
    assert size == first.stat().st_size


def test_without_code_the_file_travels_alone(tree: Path, tmp_path: Path) -> None:
    write_package(tmp_path / "p.zip", "a: 1\n", code=False, root=tree)
    with zipfile.ZipFile(tmp_path / "p.zip") as package:
        assert package.namelist() == [CONFIG]
        assert package.read(CONFIG) == b"a: 1\n"


def test_a_job_runs_from_the_package_alone(tmp_path: Path) -> None:
    write_package(tmp_path / "p.zip", "images: 1.0e+6\n")
    with zipfile.ZipFile(tmp_path / "p.zip") as package:
        package.extractall(tmp_path / "there")
    command = [sys.executable, "-m", "jobs", "plan", "--config", CONFIG]
    done = subprocess.run(command, cwd=tmp_path / "there", env={"PATH": "", "PYTHONPATH": ""}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1,000,000 images")

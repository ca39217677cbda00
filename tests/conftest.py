"""Fixtures shared by all tests: a local Ray, a real S3 server, real faces where they are, and small data sets."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes share two cores

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from cluster.dataset import Dataset
from cluster.ingest import IngestProcessor
from cluster.seaweedfs import Endpoint, seaweedfs
from cluster.session import session
from cluster.source import open_source
from cluster.stage import StageOptions, run_stage
from tests.infra.whole_run import whole_run  # noqa: F401  # one run for all tests that look at it

pytest_plugins = ["tests.faults.report"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the fault suite."""
    parser.addoption("--kills", type=int, default=0, help="kills of one fault case; 0: the short selection")


@pytest.fixture(scope="session")
def kills(pytestconfig: pytest.Config) -> int:
    """Kills of one case: few in the short selection."""
    return pytestconfig.getoption("--kills") or 3


@pytest.fixture
def long(pytestconfig: pytest.Config) -> None:
    """Marks a case that only ``make faults`` runs; a test may also ask for it in its midst, for some of its parameters."""
    if not pytestconfig.getoption("--kills"):
        pytest.skip("runs in `make faults`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the long cases out before anything of theirs is set up."""
    if config.getoption("--kills"):
        return
    for item in items:
        if "long" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip(reason="runs in `make faults`"))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """SeaweedFS, its address and keys in the environment of this process and of the Ray workers it starts."""
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as endpoint:
        before = {name: os.environ.get(name) for name in endpoint.environment}
        os.environ.update(endpoint.environment)
        endpoint.create_bucket("tests")
        yield endpoint
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture(scope="session")
def ray_session(s3_server: Endpoint) -> Iterator[None]:
    """A local Ray with 2 CPUs. It starts after the S3 server, whose environment its workers inherit."""
    with session(num_cpus=2):
        yield
    assert not ray.is_initialized()


@pytest.fixture
def s3_root(s3_server: Endpoint, request: pytest.FixtureRequest) -> str:
    """An empty prefix of its own in the test bucket."""
    return f"s3://tests/{abs(hash(request.node.nodeid))}"


@pytest.fixture(params=["folder", "s3"])
def any_root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty root, in a local folder and on S3."""
    return str(tmp_path / "root") if request.param == "folder" else request.getfixturevalue("s3_root")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real faces and recognisers."""
    folder = Path(os.environ.get("FACEMAE_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "faces").is_dir():
        pytest.skip(f"no real faces at {folder} (set FACEMAE_SHARED)")
    return folder


@pytest.fixture
def make_dataset(ray_session: None) -> Callable[..., Dataset]:
    """Ingests a source into a root: ``make_dataset(root, "synthetic:ids=6,images=10", shard_size=20)``."""

    def make(root: str, source: str = "synthetic:ids=6,images=10", shard_size: int = 20, **options: bool) -> Dataset:
        opened = open_source(source)
        units, output = opened.units(shard_size), Dataset(root)
        run_stage(IngestProcessor(opened, **options), units, output, name="ingest", kind="images", options=StageOptions(num_workers=2))
        return output

    return make

"""``facemae plan``: memory, actors, traffic and hours of a run before it is paid for, from rates that were measured."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cluster.index_choice import Choice, choose
from cluster.quantizer import ITERATIONS, SAMPLES_PER_CELL
from cluster.routing import Route, request_bytes
from jobs.command import Config, UsageError, main_of
from jobs.plan_line import Basis, Line
from jobs.rates import Rate, load_rates

GIB, HOUR = 1 << 30, 3600.0
MEASURED_DIM, MEASURED_RECALL = 512, 0.99
"""At which the rates of the index were measured."""
GALLERIES, SEARCHES = 2, 4
"""Of each attacker: originals and protected; the leakage, plain and adapted, the reference and the utility."""
LOOKS = 2
"""The few queries at rank 1 are looked at again in more cells, for as much again at the most (cluster.leakage.WIDER)."""
ROW_BYTES, RANK_BYTES = 60, 80
"""Of an embedding beside its vector (key, label, number, cell), and of a row of ranks."""
NEIGHBOURS, THRESHOLDS = 2, 2
"""What `facemae leakage` asks for each query: the nearest but itself, and how many are nearer than each of two mates."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Config):
    """Say what a run of this size needs - memory, index actors, disk, traffic, time by step - and how each figure is known.

    Every line ends in its basis: MEASURED (a figure of jobs/rates.yaml as it stands: where, when, at which commit), EXTRAPOLATED (from
    such a figure, by the formula shown), COMPUTED (arithmetic without any measurement), GIVEN (from your rate), or NOT MEASURED.
    Reads nothing but the rates, writes nothing, starts nothing.
    Next: facemae ingest.
    """

    images: float
    """Images of the original set, e.g. 260e6; the protected set has as many."""
    gpus: int = 0
    """GPUs of the cluster; 0: CPUs alone."""
    nodes: int = 0
    """Machines; 0 takes one for every 8 GPUs, at least one."""
    cores_per_node: int = 32
    """CPU cores of each machine."""
    node_memory: float = 256.0
    """Memory of each machine, GiB."""
    gpu_memory: float = 80.0
    """Memory of each GPU, GiB."""
    dim: int = 512
    """Length of an embedding."""
    recall: float = 0.99
    """Share of queries that the search is to answer as an exact one would."""
    probes: int = 0
    """Cells that a query probes, as `facemae leakage` printed on a set like yours; 0 takes what was measured (at a recall of 0.99)."""
    attackers: int = 1
    """Recognisers that attack, `pixels` counted as one (docs/leakage.md); each embeds both sets and searches four times."""
    gpu_images_per_second: float | None = None
    """Your measured rate of `facemae protect` on one GPU; no GPU rate has been measured by us."""
    gpu_embeddings_per_second: float | None = None
    """Your measured rate of `facemae embed` on one GPU."""

    def __post_init__(self) -> None:
        least: dict[str, float] = {"images": 1, "gpus": 0, "nodes": 0, "probes": 0, "cores_per_node": 1, "dim": 1, "attackers": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if isinstance(value, int | float) and not smallest <= value < math.inf:
                raise UsageError(f"--{name.replace('_', '-')} {value}: give {smallest} or more")
        for name in ("node_memory", "gpu_memory", "gpu_images_per_second", "gpu_embeddings_per_second"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not 0 < value < math.inf:
                raise UsageError(f"--{name.replace('_', '-')} {value}: give a number above 0")
        if isinstance(self.recall, int | float) and not 0 < self.recall <= 1:
            raise UsageError(f"--recall {self.recall}: give a share above 0, at most 1")

    @property
    def num_images(self) -> int:
        """Images as a whole number."""
        return round(self.images)

    @property
    def num_nodes(self) -> int:
        """Machines, given or for the GPUs."""
        return self.nodes or max(1, math.ceil(self.gpus / 8))

    @property
    def cores(self) -> int:
        """Cores of all machines."""
        return self.num_nodes * self.cores_per_node


def plan(config: PlanConfig, rates: Mapping[str, Rate]) -> list[Line]:
    """All lines: the rates, disk, index, traffic, time by step, and the sum of the times."""
    choice = choose(config.num_images, config.dim, num_nodes=config.num_nodes)
    probes = _probes(config, choice, rates)
    measured = [Line("rates", name, rate.value, rate.unit, "measured", rate.source()) for name, rate in rates.items()]
    times = [*_stage_times(config, rates), *_index_times(config, choice, probes.value, rates)]
    return [*measured, *_sizes(config), *_index(config, choice), probes, *_traffic(config, choice, probes.value), *times, _total(times)]


def _sizes(config: PlanConfig) -> Iterator[Line]:
    """What is stored beside the images."""
    row, sets, searches = 2 * config.dim + ROW_BYTES, GALLERIES * config.attackers, SEARCHES * config.attackers
    of_each = f"{sets} sets x images x (2 x dim + {ROW_BYTES}) bytes"
    yield Line("disk", "embeddings", sets * config.num_images * row, "B", "computed", of_each)
    twice = "and as much again for the one being built"
    yield Line("disk", "indexes", sets * config.num_images * row, "B", "computed", f"{of_each}, {twice}")
    ranks = searches * config.num_images * RANK_BYTES
    yield Line("disk", "ranks", ranks, "B", "computed", f"{searches} searches x images x {RANK_BYTES} bytes")


def _index(config: PlanConfig, choice: Choice) -> Iterator[Line]:
    """The actors that hold one gallery, and whether they fit."""
    held = config.num_images * choice.bytes_per_image
    yield Line(
        "index",
        "actors",
        choice.num_actors,
        "",
        "computed",
        f"{choice.factory}: cluster/index_choice.py's for this size and {config.num_nodes} nodes",
    )
    yield Line("index", "parts", choice.num_parts, "", "computed", "likewise; what an actor loads, and loads again when it is lost")
    yield Line("index", "cells", choice.num_cells, "", "computed", "likewise; 0: every image is compared with every query")
    yield Line(
        "index", "memory of an actor", held / choice.num_actors, "B", "computed", f"images x {choice.bytes_per_image} bytes / actors"
    )
    yield Line("index", "memory of all actors", held, "B", "computed", f"images x {choice.bytes_per_image} bytes; {_room(config, held)}")


def _room(config: PlanConfig, held: float) -> str:
    """Whether so many bytes fit the nodes and the GPUs."""
    places = {"nodes": config.num_nodes * config.node_memory, "GPUs": config.gpus * config.gpu_memory}
    shares = {name: held / (room * GIB) for name, room in places.items() if room}
    return ", ".join(f"{share:.0%} of all {name}' memory: {'fits' if share <= 1 else 'DOES NOT FIT'}" for name, share in shares.items())


def _probes(config: PlanConfig, choice: Choice, rates: Mapping[str, Rate]) -> Line:
    """Cells that a query probes."""
    name, rate = "cells probed by a query", rates.get("index_probes")
    if choice.exact:
        return Line("index", name, 0, "", "computed", "there are none")
    if config.probes:
        return Line("index", name, min(config.probes, choice.num_cells), "", "given", "--probes")
    if rate is None or config.recall != MEASURED_RECALL:
        return Line(
            "index", name, None, "", "not measured", f"run facemae leakage on a part at a recall of {config.recall:g}, and give --probes"
        )
    why = "from index_probes: the same number in a larger gallery of smaller cells"
    return Line("index", name, min(rate.value, choice.num_cells), "", "extrapolated", why)


def _traffic(config: PlanConfig, choice: Choice, probes: float | None) -> Iterator[Line]:
    """Bytes between the actors and those who ask."""
    actors, searches = choice.num_actors, SEARCHES * config.attackers
    message = request_bytes([Route(0, np.zeros(1, np.int64), np.empty((1, 0), np.int32))], config.dim, THRESHOLDS, NEIGHBOURS)
    asked: float = actors
    basis: Basis = "computed"
    if probes is None or choice.exact:
        why = f"all of them: {'there are no cells' if choice.exact else 'the cells probed are not known'}"
    else:
        asked, basis = actors * (1 - (1 - 1 / actors) ** probes), "extrapolated"
        why = "A (1 - (1 - 1/A)^probes), A actors with their cells dealt at random: at most, as neighbouring cells have one owner"
    query = asked * message + 4 * (probes or 0)
    yield Line("traffic", "actors asked by a query", asked, "", basis, why)
    less = f"{actors * message / query:.1f} x less than to every actor"
    yield Line("traffic", "a query", query, "B", basis, f"actors asked x {message} bytes + probes x 4 bytes; {less}")
    yield Line("traffic", "all searches", query * config.num_images * searches, "B", basis, f"a query x images x {searches} searches")


def _stage_times(config: PlanConfig, rates: Mapping[str, Rate]) -> Iterator[Line]:
    """Hours of the steps that run through the images."""
    images = config.num_images
    yield _on_cores("ingest", images, "ingest", config, rates)
    embeddings = GALLERIES * config.attackers * images
    name = f"embed x {GALLERIES * config.attackers}"
    if config.gpus:
        yield _on_gpus(name, embeddings, config.gpu_embeddings_per_second, "--gpu-embeddings-per-second", config)
        device = _on_gpus("protect", images, config.gpu_images_per_second, "--gpu-images-per-second", config)
        path = _on_cores("protect", images, "protect_path", config, rates)
        # storage, tar and JPEG run beside the GPUs: the slower of the two counts
        yield path if device.value is not None and path.value is not None and path.value > device.value else device
    else:
        yield _on_cores(name, embeddings, "embed", config, rates)
        yield _on_cores("protect", images, "protect_facemae", config, rates)


def _index_times(config: PlanConfig, choice: Choice, probes: float | None, rates: Mapping[str, Rate]) -> Iterator[Line]:
    """Hours of building the indexes and of the searches: what each image or query takes, and the similarities that are computed."""
    builds, searches, cells, images = GALLERIES * config.attackers, SEARCHES * config.attackers, choice.num_cells, config.num_images
    scale, per_dim = config.dim / MEASURED_DIM, f"dim/{MEASURED_DIM}"
    if not choice.exact:
        work = f"{builds} x {ITERATIONS} x {SAMPLES_PER_CELL} x cells^2 x {per_dim}"
        training = builds * ITERATIONS * SAMPLES_PER_CELL * cells**2 * scale
        yield _on_cores(
            f"quantiser x {builds}", training, "similarities", config, rates, f"{work}, on one node", cores=config.cores_per_node
        )
        yield _on_cores(f"index: path x {builds}", builds * images, "index_build", config, rates, f"{builds} x images")
        work = f"{builds} x images x cells x {per_dim}"
        yield _on_cores(f"index: cells x {builds}", builds * images * cells * scale, "similarities", config, rates, work)
    yield _on_cores(f"search: path x {searches}", searches * images, "index_search", config, rates, f"{searches} x images")
    if probes is None:
        yield Line("time", f"search x {searches}", None, "h", "not measured", "the cells probed are not known")
        return
    compared = images if choice.exact else cells + LOOKS * probes * images / cells
    work = f"{searches} x images x {'images' if choice.exact else f'(cells + {LOOKS} x probes x images/cells)'} x {per_dim}"
    yield _on_cores(f"search x {searches}", searches * images * compared * scale, "similarities", config, rates, work)


def _on_cores(
    name: str, amount: float, rate_name: str, config: PlanConfig, rates: Mapping[str, Rate], work: str = "images", cores: int = 0
) -> Line:
    """Hours of a step on ``cores`` cores, all of the cluster by default, as though cores added up."""
    rate, cores = rates.get(rate_name), cores or config.cores
    if rate is None:
        return Line("time", name, None, "h", "not measured", f"there is no rate {rate_name} in jobs/rates.yaml")
    why = f"from {rate_name}: {work} / ({rate.per_core:,.4g} {rate.unit} a core x {cores})"
    return Line("time", name, amount / (rate.per_core * cores) / HOUR, "h", "extrapolated", why)


def _on_gpus(name: str, amount: float, given: float | None, flag: str, config: PlanConfig) -> Line:
    """Hours of a step on all GPUs, by the rate that the user gave."""
    if given is None:
        return Line("time", name, None, "h", "not measured", f"measure it on one GPU and give {flag}")
    return Line(
        "time", name, amount / (given * config.gpus) / HOUR, "h", "given", f"images / ({given:,.4g} images/s a GPU x {config.gpus} GPUs)"
    )


def _total(times: Sequence[Line]) -> Line:
    """The sum; where a step's time is not known, the least it can be."""
    missing = [line.name for line in times if line.value is None]
    known = sum(line.value for line in times if line.value is not None)
    why = f"the sum without {', '.join(missing)}" if missing else "the sum"
    return Line("time", "at least" if missing else "all steps", known, "h", "computed", why)


def run(config: PlanConfig) -> dict[str, Any]:
    """Print the plan and return it."""
    rates = load_rates()
    lines = plan(config, rates)
    machines = f"{config.num_nodes} nodes of {config.cores_per_node} cores and {config.node_memory:g} GiB, {config.gpus} GPUs"
    print(f"{config.num_images:,} images, {config.dim} dimensions, recall {config.recall:g}, {config.attackers} attackers; {machines}")
    for part in dict.fromkeys(line.part for line in lines):
        print(f"\n{part}")
        print("\n".join(line.text() for line in lines if line.part == part))
    return {"lines": [asdict(line) for line in lines]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    return main_of(PlanConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())

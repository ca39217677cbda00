"""The pods of a run: one head, and groups of worker pods that come and go with the work."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from cluster.kubernetes.names import check_count, check_name, check_selector

GPU_MACHINES = {"nvidia.com/gpu.present": "true"}  # set by NVIDIA's GPU operator
SPOT_MACHINES = {"karpenter.sh/capacity-type": "spot"}
ON_DEMAND_MACHINES = {"karpenter.sh/capacity-type": "on-demand"}


@dataclass(frozen=True, kw_only=True)
class WorkerGroup:
    """Worker pods of one size.

    Sizes are what a pod asks of its machine, which also has the node's own daemons to run: an 8-core machine of 32 GiB fits a pod of
    7 cores and 26 GiB.

    Attributes:
        name: of the group, a DNS-1035 label.
        pods: at most so many.
        min_pods: so many even without work.
        cpus, memory_gib, gpus: of one pod. ``/dev/shm`` counts in its memory.
        scratch_gib: local disk of one pod, for temporary files and for objects that Ray spills.
        spot: whether its machines may go at any moment: pods are spread over zones and given less time to drain.
        node_selector: labels that its machines have.

    Raises:
        ValueError: a size, a name or a label that cannot be.
    """

    name: str
    pods: int
    min_pods: int = 0
    cpus: int = 7
    memory_gib: int = 26
    gpus: int = 0
    scratch_gib: int = 20
    spot: bool = False
    node_selector: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name("--group", self.name, longest=40)
        check_count("--pods", self.pods, least=1)
        check_count("--min-pods", self.min_pods, least=0)
        if self.min_pods > self.pods:
            raise ValueError(f"--min-pods {self.min_pods}: more than the most pods; give --pods {self.min_pods} or more")
        check_count("--cpus", self.cpus, least=1)
        check_count("--memory-gib", self.memory_gib, least=4)
        check_count("--gpus", self.gpus, least=0)
        check_count("--scratch-gib", self.scratch_gib, least=4)
        check_selector("--node-selector", self.node_selector)

    @property
    def drain_seconds(self) -> int:
        """Time that a pod's workers have to hand back what they do: longer than a shard takes, where the machine stays so long."""
        return 90 if self.spot else 600  # AWS gives a spot machine 120 s

    def workers_per_pod(self, cpus: int = 1, gpus: float = 0.0) -> int:
        """How many workers of so many cores and GPUs (a fraction shares one) fit one pod."""
        by_cpu = self.cpus // cpus if cpus else None
        if gpus <= 0:
            return by_cpu if by_cpu is not None else self.cpus
        by_gpu = int(self.gpus / gpus + 1e-6) if gpus >= 1 else self.gpus * int(1 / gpus + 1e-6)
        return by_gpu if by_cpu is None else min(by_cpu, by_gpu)


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The head pod, which runs the driver and no worker, and the groups of worker pods.

    Raises:
        ValueError: no group, two of one name, or a size that cannot be.
    """

    groups: tuple[WorkerGroup, ...]
    head_cpus: int = 3
    head_memory_gib: int = 12
    head_scratch_gib: int = 20
    head_selector: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.groups:
            raise ValueError("--preset: no group of workers: give at least one")
        names = [group.name for group in self.groups]
        if len(set(names)) < len(names):
            raise ValueError(f"--group {max(names, key=names.count)}: given twice; give each group its own name")
        check_count("--head-cpus", self.head_cpus, least=1)
        check_count("--head-memory-gib", self.head_memory_gib, least=4)
        check_count("--head-scratch-gib", self.head_scratch_gib, least=4)
        check_selector("--head-selector", self.head_selector)

    def fitting_workers(self, cpus: int = 1, gpus: float = 0.0) -> int:
        """How many workers of so many cores and GPUs fit when every pod is there: what ``num_workers`` may be at most."""
        return sum(group.pods * group.workers_per_pod(cpus, gpus) for group in self.groups)

    def with_pods(self, pods: int) -> Nodes:
        """The same with at most so many pods in each group."""
        check_count("--pods", pods, least=1)
        return dataclasses.replace(
            self, groups=tuple(dataclasses.replace(group, pods=pods, min_pods=min(group.min_pods, pods)) for group in self.groups)
        )

    def on(self, selector: Mapping[str, str]) -> Nodes:
        """The same with other labels asked of the workers' machines."""
        check_selector("--node-selector", selector)
        return dataclasses.replace(self, groups=tuple(dataclasses.replace(group, node_selector=dict(selector)) for group in self.groups))


PRESETS: Mapping[str, Nodes] = MappingProxyType(
    {
        "cpu": Nodes(groups=(WorkerGroup(name="cpu", pods=4),)),
        "gpu": Nodes(groups=(WorkerGroup(name="gpu", pods=8, gpus=1, node_selector=GPU_MACHINES),)),
        "spot": Nodes(
            groups=(WorkerGroup(name="spot", pods=16, gpus=1, spot=True, node_selector={**GPU_MACHINES, **SPOT_MACHINES}),),
            head_selector=ON_DEMAND_MACHINES,
        ),
        "large": Nodes(
            groups=(WorkerGroup(name="gpu", pods=64, cpus=15, memory_gib=56, gpus=1, scratch_gib=40, node_selector=GPU_MACHINES),),
            head_cpus=7,
            head_memory_gib=26,
            head_scratch_gib=40,
        ),
    }
)
"""Sets of pods by name: ``--preset`` of ``facemae submit``, and the overlays of the same names."""

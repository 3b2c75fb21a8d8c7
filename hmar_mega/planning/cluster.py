"""A cluster as the planner sees it: how many GPUs, how much memory, and how fast they compute and talk.

Descriptions are YAML files in configs/cluster; their comments say where the figures come from.
"""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from hmar_mega.config_base import Section
from hmar_mega.errors import UserError
from hmar_mega.planning.launch_settings import Container, Health, LaunchSettings, Partition

GIB = 2**30


class Cluster(Section):
    """Nodes of equal GPUs. Rates are per GPU and, for links, in one direction."""

    name: str = ""
    device: Literal["cuda", "cpu"] = Field("cuda", description="cuda: fused kernels and graphs; cpu: plain torch")
    gpu: str = Field(description="name of the GPU, as in a sentence")
    nodes: int = Field(1, ge=1)
    gpus_per_node: int = Field(8, ge=1)
    memory_gib: float = Field(gt=0, description="of one GPU")
    reserved_gib: float = Field(2.0, ge=0, description="CUDA context, NCCL buffers, libraries: not PyTorch's")
    fragmentation: float = Field(0.05, ge=0, lt=1, description="share of memory lost between tensors")
    bf16_peak_tflops: float = Field(gt=0, description="dense, from the datasheet")
    bf16_tflops: float = Field(gt=0, description="reached by large matrix products; fp16 is taken to be as fast")
    fp32_tflops: float = Field(gt=0, description="reached by large matrix products without TF32")
    memory_gb_per_s: float = Field(gt=0, description="reached by a copy: bytes read plus bytes written")
    intra_node_gb_per_s: float = Field(gt=0, description="a GPU to the others of its node")
    inter_node_gb_per_s: float = Field(gt=0, description="a GPU's share of its node's network")
    intra_node_latency_us: float = Field(10.0, ge=0, description="of one collective step inside a node")
    inter_node_latency_us: float = Field(25.0, ge=0, description="of one collective step between nodes")
    launch_us: float = Field(8.0, ge=0, description="host time to start one PyTorch operation")
    launch: LaunchSettings = Field(LaunchSettings(), description="how jobs are started there; see `hmar-mega launch`")

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.nodes * self.gpus_per_node

    @property
    def usable_bytes(self) -> float:
        """What PyTorch may allocate on one GPU."""
        return max(0.0, (self.memory_gib - self.reserved_gib) * GIB * (1 - self.fragmentation))

    def resized(self, gpus: int) -> Cluster:
        """The same machines, as many as `gpus` need; fewer than a node has are a part of one node.

        Raises:
            UserError: when more than one node is needed and `gpus` does not fill whole nodes.
        """
        if gpus <= self.gpus_per_node:
            return self.model_copy(update={"nodes": 1, "gpus_per_node": gpus})
        if gpus % self.gpus_per_node:
            raise UserError(f"{gpus} GPUs do not fill whole nodes of {self.gpus_per_node}; use a multiple of it")
        return self.model_copy(update={"nodes": gpus // self.gpus_per_node})


def packaged_clusters() -> list[str]:
    """The names that `load_cluster` knows without a path, sorted."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def load_cluster(name_or_path: str, nodes: int | None = None, gpus_per_node: int | None = None) -> Cluster:
    """Read a cluster description.

    Args:
        name_or_path: a YAML file, or the name of a packaged one (`h100-8x8`).
        nodes, gpus_per_node: win over the file.

    Raises:
        UserError: for an unknown name, key or value.
    """
    path = Path(name_or_path)
    if not (path.is_file() and path.suffix in (".yaml", ".yml")):
        path = _folder() / f"{name_or_path.removeprefix('cluster/').removesuffix('.yaml')}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(name_or_path, packaged_clusters(), n=3, cutoff=0.3) or packaged_clusters()
        raise UserError(
            f"no cluster {name_or_path!r}: not a .yaml file, and not a packaged one; nearest: {', '.join(near)}"
        )
    try:
        tree: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as err:
        raise UserError(f"cannot read {path}: {err}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must be a mapping of the keys of a cluster, not {type(tree).__name__}")
    given = {"nodes": nodes, "gpus_per_node": gpus_per_node}
    tree = {"name": path.stem, **tree, **{key: value for key, value in given.items() if value is not None}}
    try:
        return Cluster.model_validate(tree)
    except ValidationError as err:
        raise UserError("\n".join(_explain(path.name, e) for e in err.errors())) from None


def _explain(file: str, error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        of_launch: list[type[Section]] = [LaunchSettings, Partition, Container, Health]
        inner = of_launch if error["loc"][0] == "launch" else [Cluster]
        known = sorted({name for section in inner for name in section.model_fields})
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.3) or known
        return f"cluster {file}: unknown key {key}; did you mean {near[0]}?"
    if error["type"] == "missing":
        described = Cluster.model_fields.get(key)
        return f"cluster {file}: {key} is missing; it is {(described and described.description) or 'needed'}"
    return f"cluster {file}: {key}={error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _folder() -> Path:
    return Path(str(resources.files("hmar_mega.configs"))) / "cluster"

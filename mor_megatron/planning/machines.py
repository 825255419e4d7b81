"""What one rank's device can do, and how it is connected: data sheets of GPUs, or a file of what was measured.

Data sheets give peaks; the shares say how much of them a training step reaches. By default they are those of one H100
in bf16 (docs/gpu.md): 70 to 73% in products, 28% in causal attention with heads of 64, 84% in copies. Collectives are
taken to reach 80%. `tools/plan.py --calibrate` measures all of it on a machine.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import yaml

GB = 1e9


@dataclass(frozen=True)
class Machine:
    """One rank's share of a cluster."""

    name: str
    memory_gb: float
    """Memory of the device, GB (10^9 bytes)."""
    bf16_tflops: float
    """Peak of dense products in bf16 or fp16."""
    fp32_tflops: float
    """Peak of products in fp32, without TF32."""
    copy_gbs: float
    """Peak of device memory, bytes read and written, GB/s."""
    link_gbs: float
    """To ranks of the same node, in one direction, GB/s a rank."""
    network_gbs: float
    """To other nodes, in one direction, GB/s a rank."""
    node_size: int = 8
    """Ranks of a node."""
    product_share: float = 0.71
    """Of the peak that large products reach."""
    attention_share: float = 0.28
    """Of the peak that attention reaches, forward and backward."""
    copy_share: float = 0.85
    link_share: float = 0.8
    """Of links and network that collectives reach."""
    elementwise_share: float = 0.36
    """Passes over memory that are left of those of single operators, by fused kernels (140 of 390 bytes a number)."""
    operator_us: float = 5.0
    """Least time of one operator, microseconds."""
    reserved_gb: float = 4.0
    """Memory that tensors cannot have: context, libraries, NCCL, fragments."""
    is_cuda: bool = True

    def tflops(self, precision: str) -> float:
        """Peak of products in a run's precision."""
        return self.fp32_tflops if precision == "fp32" else self.bf16_tflops


# NVIDIA's data sheets: A100 80GB SXM, H100 SXM, H200 SXM, DGX B200. NVLink counts one direction, half of the figure in
# the data sheet; the network is that of the DGX of each generation, one adapter a GPU (HDR 200 Gb/s, NDR 400 Gb/s).
MACHINES = {
    machine.name: machine
    for machine in (
        Machine("A100", 80, 312, 19.5, 2039, 300, 25),
        Machine("H100", 80, 989, 67, 3350, 450, 50),
        Machine("H200", 141, 989, 67, 4800, 450, 50),
        Machine("B200", 180, 2250, 75, 8000, 900, 50),
        # One core of a recent server with its share of memory; --calibrate replaces it.
        Machine("CPU", 16, 0.2, 0.1, 10, 1, 1, 1, 0.9, 0.5, 1.0, 1.0, 1.0, 10.0, 0.0, is_cuda=False),
    )
}


def load_machine(name: str, overrides: list[str] | None = None) -> Machine:
    """A machine of the table, or of a YAML file that names one as `base` and replaces some of its values.

    Args:
        name: a name of the table, or the path of a file.
        overrides: `field=value`, with dashes or underscores; they come last.
    Raises:
        ValueError: there is no such machine or field, or a value is not a number above 0.
    """
    values: dict[str, object] = {}
    if name not in MACHINES:
        path = Path(name)
        if not path.exists():
            raise ValueError(f"machine={name} is neither known nor a file: use {', '.join(MACHINES)}, or a YAML file")
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(read, dict):
            raise ValueError(f"machine={name} is not a mapping: write one `name: value` a line")
        values = {str(key).replace("-", "_"): value for key, value in read.items()}
        values.setdefault("name", path.stem)
    for override in overrides or []:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r} is no field=value: write one such as link-gbs=300")
        values[key.replace("-", "_")] = value
    base = str(values.pop("base", name if name in MACHINES else "CPU"))
    if base not in MACHINES:
        raise ValueError(f"base={base} is unknown: use {', '.join(MACHINES)}")
    return replace(MACHINES[base], **{key: _typed(key, value) for key, value in values.items()})


def _typed(name: str, value: object) -> object:
    kinds = {field.name: field.type for field in fields(Machine)}
    if name not in kinds:
        raise ValueError(f"{name} is no property of a machine: use {', '.join(kinds)}".replace("_", "-"))
    if kinds[name] == "str":
        return str(value)
    if kinds[name] == "bool":
        return str(value).lower() == "true"
    try:
        number = float(str(value))
    except ValueError:
        number = -1.0
    if not number >= 0 or (number == 0 and name != "reserved_gb"):
        raise ValueError(f"{name.replace('_', '-')}={value} is not a number above 0: give one")
    return int(number) if kinds[name] == "int" else number

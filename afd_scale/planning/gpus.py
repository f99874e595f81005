"""What a GPU and its network can do: vendor's figures and our assumptions, to be stated wherever they are used."""

from collections.abc import Mapping
from dataclasses import dataclass

GIB = 2**30

USABLE_MEMORY = 0.90  # the rest: CUDA context, NCCL's buffers, workspaces of kernels, fragments of the allocator
COMPUTE_FRACTION = 0.50  # of the matmul rate, over a whole network with its norms and attention
NETWORK_FRACTION = 0.60  # of a link's rate, in collectives of the sizes that occur


@dataclass(frozen=True)
class Gpu:
    """One GPU in a node of its kind.

    Attributes:
        memory_gib: that CUDA reports.
        matmul_tflops: dense bf16 rate that a large matrix product reaches.
        memory_gb_per_second: bandwidth of its memory.
        nvlink_gb_per_second: to the other GPUs of the node, one direction.
        network_gb_per_second: its share of the node's network, one direction.
        gpus_per_node: that NVLink joins.
    """

    name: str
    memory_gib: float
    matmul_tflops: float
    memory_gb_per_second: float
    nvlink_gb_per_second: float = 450
    network_gb_per_second: float = 50
    gpus_per_node: int = 8

    @property
    def usable_bytes(self) -> int:
        return int(USABLE_MEMORY * self.memory_gib * GIB)

    def gather_rate(self, gpus: int) -> float:
        """Bytes a second that a rank receives in a collective over all ranks.

        Between nodes a byte crosses the network once for all GPUs of a node, over all their links together.
        """
        rate = self.nvlink_gb_per_second
        if gpus > self.gpus_per_node:
            rate = min(rate, self.gpus_per_node * self.network_gb_per_second)
        return NETWORK_FRACTION * rate * 1e9

    def exchange_rate(self, sequence: int) -> float:
        """Bytes a second that a rank receives in an all-to-all among neighbouring ranks."""
        rate = self.nvlink_gb_per_second if sequence <= self.gpus_per_node else self.network_gb_per_second
        return NETWORK_FRACTION * rate * 1e9

    def assumptions(self) -> list[str]:
        """In words, for whoever reads a prediction."""
        return [
            f"{self.name}: {self.memory_gib:g} GiB of which {USABLE_MEMORY:.0%} are for tensors, "
            f"{self.matmul_tflops:g} TFLOP/s dense bf16 matmul of which a network reaches {COMPUTE_FRACTION:.0%}, "
            f"memory {self.memory_gb_per_second:g} GB/s",
            f"{self.gpus_per_node} GPUs a node, NVLink {self.nvlink_gb_per_second:g} GB/s and network "
            f"{self.network_gb_per_second:g} GB/s a GPU and direction; collectives reach {NETWORK_FRACTION:.0%} of it",
            "ZeRO's collectives overlap with compute (not where adapters of one network take turns), Ulysses' do not",
            "Python takes 4 ms for a block's pass behind DeepSpeed's hooks and 0.7 ms without, beside the GPU's work",
            "where a rollout's passes are CUDA graphs, replaying one takes Python 0.1 ms; each step captures them anew",
            "fp8 counts as bf16 in memory and in time, compiled blocks as blocks that are not",
            "what is offloaded is not held against the node's memory",
            "a VAE decodes at 10% of the matmul rate (float32, TF32); a sample video takes 4.5 s of one core to write",
            "times and memory are computed, not measured",
        ]  # fmt: skip


# 790 TFLOP/s and 4.3 TB/s were measured on an H200. An H100 SXM has the same processor; 700 is assumed to be safe, and
# 3.35 TB/s is its vendor's figure.
GPUS: Mapping[str, Gpu] = {
    "h100": Gpu("h100", memory_gib=79.6, matmul_tflops=700, memory_gb_per_second=3350),
    "h200": Gpu("h200", memory_gib=139, matmul_tflops=790, memory_gb_per_second=4300),
}

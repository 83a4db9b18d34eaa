"""The mesh in DeepSpeed's words: the `mpu` that `deepspeed.initialize` and `zero.Init` take.

These are the methods that DeepSpeed 0.19.8 calls for ZeRO 0 to 3 and for the norm. It must have none whose name speaks of
sequence parallelism: DeepSpeed would take that for its own Ulysses, and count no tensor ranks. Context ranks are data-parallel
ranks here.
"""

from __future__ import annotations

import torch.distributed as dist

from model.parallel import Mesh


class ModelParallelUnit:
    """Tensor ranks are DeepSpeed's model-parallel ranks, replicas its data-parallel ranks."""

    def __init__(self, mesh: Mesh) -> None:
        self._tensor, self._replicas = mesh.tensor, mesh.replicas

    def get_model_parallel_rank(self) -> int:
        return self._tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self._tensor.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._tensor.group or dist.group.WORLD

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self._replicas.rank

    def get_data_parallel_world_size(self) -> int:
        return self._replicas.size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._replicas.group

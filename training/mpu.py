"""The mesh as DeepSpeed's `mpu` object, which `deepspeed.initialize` and `zero.Init` take.

These are the methods that DeepSpeed 0.19.8 calls for ZeRO 0 to 3 and for the gradient norm. Define no method whose name
contains "sequence_parallel": DeepSpeed would assume its own Ulysses and ignore the tensor ranks. Context ranks count as
data-parallel ranks here.
"""

from __future__ import annotations

import torch.distributed as dist

from model.parallel import Mesh


class ModelParallelUnit:
    """Present tensor ranks as DeepSpeed's model-parallel ranks, and data x context ranks as its data-parallel ranks."""

    def __init__(self, mesh: Mesh) -> None:
        self._tensor, self._data_context = mesh.tensor, mesh.data_context

    def get_model_parallel_rank(self) -> int:
        return self._tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self._tensor.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        group = self._tensor.group or dist.group.WORLD
        assert group is not None, "the process group exists before the mesh"
        return group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self._data_context.rank

    def get_data_parallel_world_size(self) -> int:
        return self._data_context.size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        group = self._data_context.group
        assert group is not None, "with tensor ranks, data x context ranks have a group of their own"
        return group

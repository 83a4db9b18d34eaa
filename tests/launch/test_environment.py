"""What is set before torch is imported."""

from __future__ import annotations

import pytest

from launch.environment import configure_libraries


def test_the_allocator_grows_its_segments():
    environment: dict[str, str] = {}
    configure_libraries(environment)
    assert environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_user_has_set_is_kept(name):
    environment = {name: "max_split_size_mb:256"}
    configure_libraries(environment)
    assert environment[name] == "max_split_size_mb:256"
    assert len([each for each in environment if each.endswith("ALLOC_CONF")]) == 1

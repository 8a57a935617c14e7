import pytest
import torch

from deepred_pl import memory


def test_a_containers_limit_counts(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CONTAINER_LIMIT", limit)
    free = memory.free_memory(torch.device("cpu"))  # there is no such file yet
    for text in ("max\n", f"{2**50}\n"):
        limit.write_text(text)
        assert memory.free_memory(torch.device("cpu")) == pytest.approx(free, rel=0.2)
    limit.write_text("1000\n")  # less than this process has
    assert memory.free_memory(torch.device("cpu")) == 0

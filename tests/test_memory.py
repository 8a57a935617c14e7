import pytest
import torch

from deepred_pl import memory

CPU = torch.device("cpu")


def test_a_containers_limit_counts_with_all_that_runs_in_it(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CONTAINER", tmp_path)
    free = memory.free_memory(CPU)  # there are no such files yet
    (tmp_path / "memory.current").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 3000\ninactive_file 2000\nslab 10\n")
    for text in ("max\n", f"{2**50}\n"):
        (tmp_path / "memory.max").write_text(text)
        assert memory.free_memory(CPU) == pytest.approx(free, rel=0.2)
    for limit, left in {10_000: 7000, 2500: 0}.items():
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert memory.free_memory(CPU) == left

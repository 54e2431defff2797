from concurrent.futures import ThreadPoolExecutor

import pytest

from minidoctor.study import ablation
from minidoctor.study.variants import AblationConfig


@pytest.fixture
def ablation_config(base_dir, rows_file):
    rows = [
        {"question": f"gout {i}?", "answer": "uric acid", "topic": "ab"[i % 4 // 2]} if i % 2 else
        {"question": f"痛风 {i}？", "answer": "B", "options": {"A": "哮喘", "B": "尿酸"}, "topic": "c"}
        for i in range(24)
    ]  # fmt: skip
    path = str(rows_file(*rows))
    sizes = {"n_experts": 4, "rank": 2, "queue_capacity": 8, "targets": ("up_proj", "down_proj")}
    return AblationConfig(base=str(base_dir), data=path, eval=path, steps=4, batch_size=4, eval_rows=8, **sizes)


@pytest.fixture
def in_this_process(monkeypatch):
    """Run in a thread: a new process needs seconds to import torch."""
    monkeypatch.setattr(ablation, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))

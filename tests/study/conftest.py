import os
import traceback
from types import SimpleNamespace

import pytest

from minidoctor.study import ablation
from minidoctor.study.sequence_variants import SequenceConfig
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
def sequence_config(base_dir, rows_file):
    """Questions of both languages, two departments and both forms, and a multiple-choice question."""
    rows = []
    for i in range(12):
        question, answer = (f"gout {i}?", "uric acid") if i % 2 else (f"痛风 {i}？", "尿酸")
        fields = {"id": str(i), "topic": "ab"[i % 4 // 2]}
        if i % 3:
            rows.append({"question": question, "answer": answer, **fields})
        else:
            again = ("asthma?", "a cough") if i % 2 else ("哮喘？", "咳嗽")
            messages = [("user", question), ("assistant", answer), ("user", again[0]), ("assistant", again[1])]
            rows.append({"messages": [{"role": r, "content": text} for r, text in messages], **fields})
    rows.append({"question": "B or A?", "options": {"A": "gout", "B": "asthma"}, "answer": "B"})
    path = str(rows_file(*rows))
    sizes = {"n_experts": 8, "rank": 2, "queue_capacity": 1, "targets": ("up_proj", "down_proj")}
    return SequenceConfig(base=str(base_dir), data=path, eval=path, steps=6, batch_size=2, text_paragraphs=2, **sizes)


class InlineProcess:
    """A process that runs when it is started, with the exit codes of multiprocessing.Process."""

    def __init__(self, target, args):
        self.target, self.args, self.exitcode = target, args, None
        self.sentinel, writer = os.pipe()
        os.close(writer)  # the sentinel is ready

    def start(self):
        try:
            self.target(*self.args)
            self.exitcode = 0
        except SystemExit as ended:
            self.exitcode = ended.code
        except Exception:
            traceback.print_exc()
            self.exitcode = 1

    def join(self):
        os.close(self.sentinel)

    def terminate(self):
        self.join()


@pytest.fixture
def in_this_process(monkeypatch):
    """Run without new processes, which need seconds to import torch."""
    monkeypatch.setattr(ablation.multiprocessing, "get_context", lambda _: SimpleNamespace(Process=InlineProcess))
    monkeypatch.setattr(ablation.signal, "signal", lambda *_: None)

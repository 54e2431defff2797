import pytest
import torch

from minidoctor.cli.device import choose_device, choose_dtype
from minidoctor.config import UserError


def test_devices_and_dtypes_are_chosen_by_name():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
    assert choose_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    with pytest.raises(UserError, match=r"auto, cuda, mps, cpu\b.*'tpu'"):
        choose_device("tpu")
    with pytest.raises(UserError, match=r"auto, float32, bfloat16.*'int8'"):
        choose_dtype("int8", torch.device("cpu"))


@pytest.mark.parametrize("native", [True, False])
def test_emulated_bfloat16_is_not_chosen(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert choose_dtype("auto", torch.device("cuda")) == (torch.bfloat16 if native else torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_an_unavailable_device_is_rejected_with_the_available_ones():
    assert choose_device("auto").type in ("cpu", "mps")
    with pytest.raises(UserError, match=r'"cuda" is not available.*cpu'):
        choose_device("cuda")

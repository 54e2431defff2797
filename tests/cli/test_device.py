import pytest
import torch

from minidoctor.cli.device import choose_device, choose_dtype


def test_devices_and_dtypes_are_chosen_by_name():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
    assert choose_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    with pytest.raises(ValueError, match="device must be auto, cpu, cuda, mps, got 'tpu'"):
        choose_device("tpu")
    with pytest.raises(ValueError, match="dtype must be auto, float32, bfloat16, got 'int8'"):
        choose_dtype("int8", torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_refused():
    assert choose_device("auto").type in ("cpu", "mps")
    with pytest.raises(ValueError, match="device cuda is not there"):
        choose_device("cuda")

"""The choice of device and dtype by name, with "auto" for the best that the machine has."""

import torch

from minidoctor.config import check


def choose_device(name: str) -> torch.device:
    """Return the device, "auto": the first available of cuda, mps and cpu. Raises UserError."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kinds = [kind for kind in available if available[kind]]
    check(name in ("auto", *available), f"device must be auto, {', '.join(available)}, got {name!r}")
    check(
        name in ("auto", *kinds),
        f'device "{name}" is not available (torch {torch.__version__} finds: {", ".join(kinds)})',
    )
    return torch.device(kinds[0] if name == "auto" else name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the frozen base, "auto": bfloat16 on a GPU that has it, else float32. Raises UserError."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name == "auto":
        # By default, torch also counts GPUs that only emulate bfloat16, such as a T4.
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if has_bfloat16 else "float32"
    check(name in dtypes, f"dtype must be auto, {', '.join(dtypes)}, got {name!r}")
    return dtypes[name]

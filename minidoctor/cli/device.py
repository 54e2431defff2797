"""TODO"""

import torch

from minidoctor.config import check


def choose_device(name: str) -> torch.device:
    """Raises ValueError if there is none of that kind."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    check(name in available, f"device must be auto, {', '.join(available)}, got {name!r}")
    check(
        available[name],
        f"device {name} is not there, torch {torch.__version__} finds only "
        f"{', '.join(kind for kind in available if available[kind])}",
    )
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Of the frozen base. Raises ValueError."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    check(name in dtypes, f"dtype must be auto, {', '.join(dtypes)}, got {name!r}")
    return dtypes[name]

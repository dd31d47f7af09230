"""Which device and number format a computation runs in."""

import torch

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
DEVICES = ("auto", "cpu", "cuda")


def choose_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU.

    Raises:
        ValueError: an unknown name, or CUDA asked for and absent.
    """
    if name not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {name!r}")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("device is cuda, but PyTorch finds no CUDA device here: use auto or cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")

"""Which device torch computes on."""

import re
from typing import TYPE_CHECKING

from placer.errors import PlacerError, UsageError

if TYPE_CHECKING:
    import torch

CPU = "cpu"
_KNOWN = re.compile(r"cpu|cuda(:\d+)?")


def torch_device(name: str) -> "torch.device":
    """Return the device of that name, which is there.

    Parameters
    ----------
    name
        ``cpu``, ``cuda`` or ``cuda:1``.

    Raises
    ------
    UsageError
        If it is not such a name.
    PlacerError
        If torch finds no such GPU.
    """
    import torch

    if not _KNOWN.fullmatch(name):
        raise UsageError(f"--device {name} is not known", "choose cpu or cuda")
    device = torch.device(name)
    number = torch.cuda.device_count()
    if device.type != CPU and (device.index or 0) >= number:
        raise PlacerError(
            f"--device {name} needs a GPU that torch can use, and torch "
            f"{torch.__version__} finds {number}",
            "compute on the CPU: --device cpu; on a machine with a GPU, install its driver "
            "and torch for CUDA",
        )
    return device

"""What scripts/check_gpu checks in parts: how codes become operands, and random cases of store, decode and extend."""

from typing import Final

import torch

DEVICE: Final = torch.device("cuda")

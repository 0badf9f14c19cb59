"""The stubs are imported by name, by tests and by the workers that tests launch."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

# The models of these tests are too small for two threads to help, and the machine may be shared.
torch.set_num_threads(1)

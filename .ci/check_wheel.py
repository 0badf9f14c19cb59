"""What an installed wheel must do without the checkout: known numbers through the compiled kernels."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import aqnsim

package = Path(aqnsim.__file__).resolve().parent
assert Path(sys.prefix).resolve() in package.parents, f"aqnsim was imported from {package}, not from the wheel"

ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6])
assert aqnsim.cast(ties, "mxfp4").tolist() == [0, 1, 1, 2, 2, 4, 4, 6]

below_8 = torch.tensor([7.9999995])
assert aqnsim.cast(below_8, "mxfp4").item() == 6.0, "the shared scale must come from the exponent bits"

assert (package / "csrc/cuda/device.cuh").is_file(), "the wheel lacks the sources that are compiled on a GPU"
assert (package / "csrc/core/bits.h").is_file()

for name in aqnsim.profiles.names():
    aqnsim.profiles.load(name)

model = torch.nn.Linear(64, 64)
x = torch.randn(2, 64)
clean = model(x)
with aqnsim.emulate(torch.nn.Sequential(model), "mxfp4-w4a4") as emu:
    emulated = model(x)
    assert not torch.equal(emulated, clean)
assert torch.equal(model(x), clean)
assert {r.requested for r in emu.receipts()} == {"mxfp4"}
print(f"aqnsim {aqnsim.__version__} works from {package}")

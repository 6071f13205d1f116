"""Packages whose layers have rules; some ask for torchvision or torchaudio, and run without."""

from __future__ import annotations

from benchmarks.coverage.packages import PACKAGES
from benchmarks.coverage.stand_ins import import_package

for name in PACKAGES:
    import_package(name)

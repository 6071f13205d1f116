"""Packages whose layers have rules; some ask for torchvision or torchaudio, and run without."""

from __future__ import annotations

from benchmarks.coverage.packages import PACKAGES
from benchmarks.coverage.stand_ins import import_package

MORE = "blitz bayesian_torch e3nn rtdl_num_embeddings hyper_connections product_key_memory norse"

for name in [*PACKAGES, *MORE.split()]:
    import_package(name)

"""For the whole suite: no spinning threads, no network, no uninitialized memory taken for a result."""

import os

# OpenMP reads it when torch is imported: on few cores, threads that spin while they wait starve the others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402 - after the environment

# torch.empty and its kind now give NaN, True or the largest integer, so that an output element that nobody
# wrote is seen. PyTorch fills only in deterministic mode; that mode itself is not what is tested: warn_only.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True

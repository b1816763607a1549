"""The `edgewright::` ops under a short name."""

from __future__ import annotations

import torch

EW = torch.ops.edgewright

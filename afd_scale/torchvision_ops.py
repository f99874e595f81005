"""Lets torchvision, and with it `streaming`, import under a torch without CUDA."""

import torch


def define_torchvision_ops() -> None:
    """Define the schemas of `torchvision::nms` and `qnms` where torch lacks them; call it before the first import.

    PyPI's torchvision is a CUDA build: its compiled operators do not load beside a CPU torch, and
    `import torchvision` then fails while it registers a fake kernel for `nms`. The schemas are all that it needs.
    Goes when PyPI's torchvision imports beside a CPU torch (0.28 does not).
    """
    if torch.version.cuda is not None:
        return
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)

"""The progressive teacher: the student as it was at the end of the previous epoch (arXiv 2211.07566, PSD)."""

import copy
import hashlib
from typing import Any

import torch
from torch import nn

from dist_obdsd.distributed import collectives
from dist_obdsd.errors import RunError


class ProgressiveTeacher:
    """A frozen copy of the student, parameters and buffers, always in eval mode and outside any wrapper.

    Promotion is collective: the bytes are compared across the ranks, since a teacher that drifts apart between them
    would distil different targets without any visible sign.
    """

    def __init__(self, student: nn.Module) -> None:
        self.network = copy.deepcopy(student).requires_grad_(False).eval()
        self.epoch = 0
        """How many epochs the weights were trained for: 0 is the initial student."""

    @torch.inference_mode()
    def __call__(self, images_bCss: torch.Tensor) -> torch.Tensor:
        """Embed images as unit rows [b, D], without gradient.

        They are an inference tensor: copy them (``torch.cat`` does) before they meet others with a gradient.
        """
        return self.network(images_bCss)

    @torch.no_grad()
    def promote(self, student: nn.Module, epoch: int) -> None:
        """Take over the student's weights after ``epoch`` epochs. Collective.

        Raises:
            RunError: on every rank, with the names of the tensors that differ between ranks.
        """
        self.network.load_state_dict(student.state_dict())
        self.epoch = epoch
        check_identical("the teacher", self.network)

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave. Collective."""
        self.network.load_state_dict(state["network"])
        self.epoch = state["epoch"]
        check_identical("the teacher", self.network)


def fingerprints(network: nn.Module) -> dict[str, str]:
    """Digest each tensor's bytes."""
    return {
        name: hashlib.sha256(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
        if tensor.dim()
        else repr(tensor.item())
        for name, tensor in network.state_dict().items()
    }


def check_identical(what: str, network: nn.Module) -> None:
    """Compare a network's bytes across the ranks; ``what`` it is goes into the error. Collective.

    Raises:
        RunError: on every rank, with the names of the tensors that differ.
    """
    all_prints = collectives.gather_json(fingerprints(network))
    differing = sorted({name for prints in all_prints for name in prints if prints[name] != all_prints[0][name]})
    if differing:
        shown = ", ".join(differing[:5]) + (", ..." if len(differing) > 5 else "")
        raise RunError(
            f"{what} differs between ranks in {len(differing)} tensors ({shown}); "
            f"check that all nodes run the same versions, and resume from the last checkpoint"
        )

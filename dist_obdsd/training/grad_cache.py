"""Cached gradients: those of one big batch in the memory of a small one.

Embed in chunks without a graph, take the loss's gradient at the embeddings, then embed each chunk again, with its
graph, and hand that gradient on (Gao et al., Scaling deep contrastive learning batch size under memory limited setup,
arXiv 2101.06983). It costs one more forward pass and changes nothing: every chunk's second pass draws the same random
numbers as its first.

Legend: b rows of this rank, D embedding dimension.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

Embed = Callable[[torch.Tensor], torch.Tensor]


class GradCache:
    """The embeddings of one batch, computed chunk by chunk, and their backward pass."""

    def __init__(self, embed: Embed, images_b: torch.Tensor, chunk: int) -> None:
        """Embed every chunk once, without a graph.

        Args:
            embed: images to rows; each row must depend on its own image alone, or on its chunk.
            images_b: this rank's images.
            chunk: how many are embedded at a time.
        """
        self._chunks = images_b.split(chunk)
        self._states = []
        rows = []
        with torch.no_grad():
            for images in self._chunks:
                self._states.append(_random_state(images_b.device))
                rows.append(embed(images))
        self.E_bD = torch.cat(rows).requires_grad_()
        """The embeddings, a leaf. A backward from the loss leaves its gradient there."""

    def backward(
        self,
        embed: Embed,
        unsynced: Callable[[], AbstractContextManager[None]] = nullcontext,
        backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
    ) -> None:
        """Hand ``E_bD``'s gradient on to the parameters.

        Args:
            embed: as before, now with its graph.
            unsynced: a context in which the ranks' gradients are not yet summed up; the last chunk runs outside it.
            backward: of a scalar.
        """
        assert self.E_bD.grad is not None, "the loss's backward comes first"
        gradients = self.E_bD.grad.split([len(images) for images in self._chunks])
        last = len(self._chunks) - 1
        device = self.E_bD.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for i, (images, gradient, state) in enumerate(zip(self._chunks, gradients, self._states, strict=True)):
                with nullcontext() if i == last else unsynced():
                    _set_random_state(state, device)
                    # A scalar whose gradient at the embeddings is the one that was kept.
                    backward((embed(images) * gradient).sum())


def _random_state(device: torch.device) -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(states: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)

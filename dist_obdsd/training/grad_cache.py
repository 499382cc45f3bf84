"""Cached gradients: those of one big batch in the memory of a small one.

Embed in chunks without a graph, take the loss's gradient at the embeddings, then embed each chunk again, with its
graph, and hand that gradient on (Gao et al., Scaling deep contrastive learning batch size under memory limited setup,
arXiv 2101.06983). It costs one more forward pass and changes nothing, since no network here draws random numbers.

Legend: b rows of this rank, D embedding dimension.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

Embed = Callable[[torch.Tensor], torch.Tensor]


class GradCache:
    """The embeddings of one batch, computed chunk by chunk, and their backward pass."""

    def __init__(self, embed: Embed, images_b: torch.Tensor, chunk: int) -> None:
        """Embed ``images_b``, ``chunk`` at a time, without a graph.

        Args:
            embed: images to rows; each row must depend on its own image alone, or on its chunk.
        """
        self._chunks = images_b.split(chunk)
        with torch.no_grad():
            rows_bD = torch.cat([embed(images) for images in self._chunks])
        self.E_bD = rows_bD.requires_grad_()
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
        for images, gradient in zip(self._chunks, gradients, strict=True):
            with nullcontext() if images is self._chunks[-1] else unsynced():
                # A scalar whose gradient at the embeddings is the one that was kept.
                backward((embed(images) * gradient).sum())

"""Pooling: from a map or from tokens to one row of features an image."""

import torch
from torch import nn

from dist_obdsd.errors import InputError


class Pool(nn.Module):
    """A map [b, F, h, w], tokens [b, n, F] or features [b, F] to features [b, F].

    ``gem`` is the generalised mean with a learnt exponent (Radenovic et al., TPAMI 2018), of positive features.
    """

    def __init__(self, kind: str, prefix: int = 0, *, dims: tuple[int, int] = (2, 3), keepdim: bool = False) -> None:
        """
        Args:
            kind: ``avg``, ``max``, ``avg+max``, ``gem`` or ``cls``, the first token.
            prefix: tokens before those of the image's patches.
            dims: of a map's rows and columns, left with length 1 if ``keepdim``.
        """
        super().__init__()
        self.kind, self.prefix, self.dims, self.keepdim = kind, prefix, dims, keepdim
        if kind == "gem":
            self.p = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 2:
            return x
        if self.kind == "cls":
            return x[:, 0]
        x, dims = (x, self.dims) if x.dim() == 4 else (x[:, self.prefix :], (1,))
        if self.kind == "avg":
            return x.mean(dims, keepdim=self.keepdim)
        if self.kind == "max":
            return x.amax(dims, self.keepdim)
        if self.kind == "avg+max":
            return x.mean(dims, keepdim=self.keepdim) + x.amax(dims, self.keepdim)
        return x.clamp(min=1e-6).pow(self.p).mean(dims, keepdim=self.keepdim).pow(1 / self.p)


def exchange_pool(net: nn.Module, name: str, kind: str) -> None:
    """Exchange a classifier's own pooling, or raise InputError; what follows stays."""
    pools = [(path, module) for path, module in net.named_modules() if _pools_all(module)]
    if pools and kind != "cls":
        path, old = pools[-1]
        inner = getattr(old, "pool", None)  # timm's, for maps whose channels come last
        dims: tuple[int, int] = tuple(getattr(inner, "dim", (2, 3)))
        flat = isinstance(getattr(old, "flatten", None), nn.Flatten) or bool(getattr(inner, "flatten", False))
        net.set_submodule(path, Pool(kind, dims=dims, keepdim=not flat))
        return
    tokens = {"cls": "token", "avg": "avg", "max": "max", "avg+max": "avgmax"}
    # timm's vision transformers pool in a method that reads these two.
    can = hasattr(net, "pool") and (kind != "cls" or bool(getattr(net, "num_prefix_tokens", 0)))
    if can and kind in tokens:
        net.global_pool, net.attn_pool = tokens[kind], None  # type: ignore[assignment]
        return
    raise InputError(f"model.pooling={kind} does not fit {name}; set model.pooling=own")


def _pools_all(module: nn.Module) -> bool:
    """Tell if a module pools a whole map: torch's with output size 1, or timm's."""
    if type(module).__name__ == "SelectAdaptivePool2d":
        return True
    return isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1))

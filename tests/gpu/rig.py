"""A network with all that a step needs, on a device, and comparisons that print what they found.

Legend: b rows of this rank, B rows of the global batch.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import pytest
import torch

from benchmarks.step import build_config, build_step, made_up_batch, made_up_images, spread
from dist_obdsd.config import Config
from dist_obdsd.data.stream import TrainBatch
from dist_obdsd.distributed.launch import Launch, Runtime
from dist_obdsd.models.embedder import build_embedder
from dist_obdsd.training.train_step import TrainProgress

CPU = torch.device("cpu")
B = 32


def within(what: str, found: float, limit: float) -> None:
    """Print what was found, and check that it is neither above the limit nor NaN."""
    text = f"{what} {found:.1e} (at most {limit:.0e})"
    print(text)
    assert found <= limit, text


def settings(backbone: str, *overrides: str) -> Config:
    """A batch of 32 in pairs, and an objective that is smooth: with so wide a margin no pair is mined away, so rounding
    cannot decide which pairs count."""
    chosen = [f"model.backbone={backbone}", "model.embedding_dim=32", "distillation.transition_temperature=0.05",
              "optim.lr=1e-3"]  # fmt: skip
    if backbone != "small_cnn":
        chosen.append("data.image_size=64")
    if not any(override.startswith("ranking.name=") for override in overrides):
        chosen += ["ranking.name=multi_similarity", "ranking.margin=2.5", "ranking.beta=10"]
    return build_config(B, *chosen, *overrides)


@cache
def spread_weights(backbone: str) -> dict[str, torch.Tensor]:
    """Initial weights in float64 whose embeddings of a batch point in all directions."""
    config = settings(backbone, "precision=float64")
    network = build_embedder(config, CPU)
    spread(network, made_up_images(config))
    return network.state_dict()


class Rig:
    """A student that has moved away from its teacher, with an objective and an optimizer."""

    def __init__(self, config: Config, device: torch.device, rank: Runtime | None = None) -> None:
        """
        Args:
            rank: of a running process group; by default there is this process alone.
        """
        self.config, self.device = config, device
        self.rank = rank or Runtime(Launch("check"), device)
        self.student = build_embedder(config, device)
        self.student.load_state_dict(spread_weights(config.model.backbone))
        self.step = build_step(config, self.rank, self.student)
        self.objective, self.strategy = self.step.objective, self.step.strategy
        if config.model.compile and self.student._compiled_call_impl is None:
            pytest.skip("torch.compile does not work here")
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in self.student.parameters():  # drawn in float32 on the CPU, so that all rigs move alike
                noise = torch.randn(p.shape, generator=draw)
                p.add_((0.05 * noise * p.detach().float().cpu().std(correction=0)).to(p))
        # As on a GPU, whose diffusion is queued before anybody looks at it; the reference looks at once.
        self.step.early_diffusion = config.precision != "float64"
        self.taken = 0
        self.gradients: dict[str, torch.Tensor] = {}
        self.strategy.optimizer.register_step_pre_hook(lambda *_: self._keep_gradients())

    def _keep_gradients(self) -> None:
        found = {name: p.grad for name, p in self.strategy.parameters if p.grad is not None}
        self.gradients = {name: grad.detach().clone() for name, grad in found.items()}

    def batch(self, seed: int = 0) -> TrainBatch:
        """The next step's."""
        return made_up_batch(self.config, self.rank, seed, self.taken)

    def take(self, batch: TrainBatch | None = None) -> tuple[list[str], torch.Tensor]:
        """One step of the second epoch, at half the ramp: names and the numbers that they name, on the device."""
        batch = replace(batch or self.batch(), step=self.taken)
        answer = self.step(batch, TrainProgress(1, self.taken, self.taken), 0.0)
        self.taken += 1
        return answer

    def numbers(self, batch: TrainBatch | None = None) -> dict[str, float]:
        names, values = self.take(batch)
        return dict(zip(names, values.tolist(), strict=True))

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of all weights and of all that the optimizer keeps."""
        kept = {f"weights.{name}": tensor for name, tensor in self.student.state_dict().items()}
        for name, state in self.strategy.state_dict()["optimizer"].items():
            kept |= {f"{name}.{key}": value for key, value in state.items() if isinstance(value, torch.Tensor)}
        return {name: tensor.detach().clone() for name, tensor in kept.items()}


def distance(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> float:
    """The norm of all differences in units of the norm of what is wanted, in float64 on the CPU."""
    assert found.keys() == wanted.keys()
    pairs = [(found[name].cpu().double(), wanted[name].cpu().double()) for name in wanted]
    difference = torch.stack([(a - b).square().sum() for a, b in pairs]).sum().sqrt()
    return float(difference / torch.stack([b.square().sum() for _, b in pairs]).sum().sqrt())


def same_bits(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name].cpu(), wanted[name].cpu()) for name in wanted)

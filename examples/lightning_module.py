"""OBD-SD as a Lightning module: torchrun --nproc-per-node 2 examples/lightning_module.py SHARDS."""

import os
import sys

import lightning
import torch
from ddp import Student
from lightning.pytorch.callbacks import Callback
from torch import nn

from dist_obdsd import BalancedStream, MultiSimilarityLoss, OBDSDLoss, ProgressiveTeacher


class Module(lightning.LightningModule):
    def __init__(self, student: nn.Module, lr: float, weight: float = 10.0) -> None:
        super().__init__()
        self.student, self.lr = student, lr
        self.teacher = ProgressiveTeacher(student)  # in the checkpoint, moved along, and out of the optimizer's reach
        self.loss = OBDSDLoss(MultiSimilarityLoss(), weight=weight)
        self.history: list[torch.Tensor] = []

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        images, labels = batch
        ramp = self.current_epoch / self.trainer.max_epochs
        targets = self.teacher(images) if self.loss.needs_teacher(ramp) else None
        out = self.loss(self.student(images), labels, targets, ramp=ramp)
        self.history.append(out.loss.detach())
        return out.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.lr, fused=True)


class Promote(Callback):
    def on_train_epoch_end(self, trainer: lightning.Trainer, module: Module) -> None:
        module.teacher.update(module.student)


def train(student: nn.Module, stream: BalancedStream, epochs: int, lr: float, weight: float = 10.0) -> list[float]:
    trainer = lightning.Trainer(
        max_epochs=epochs, devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")), callbacks=[Promote()],
        use_distributed_sampler=False,  # the stream gives each rank its own rows already
        accelerator="auto" if torch.cuda.is_available() else "cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Module(student, lr, weight)
    trainer.fit(module, stream)
    return torch.stack(module.history).tolist()


if __name__ == "__main__":
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.manual_seed(0)
    stream = BalancedStream(sys.argv[1], global_batch_size=64, image_size=64, rank=rank, world_size=ranks)
    losses = train(Student(), stream, epochs=2, lr=1e-4)
    print(f"{len(losses)} steps, loss {losses[0]:.4f} to {losses[-1]:.4f}")

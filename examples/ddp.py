"""OBD-SD in a plain DDP loop: torchrun --nproc-per-node 2 examples/ddp.py SHARDS."""

import os
import sys

import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_obdsd import BalancedStream, MultiSimilarityLoss, OBDSDLoss, ProgressiveTeacher


class Student(nn.Module):
    """Any network whose rows have length 1, and whose rows do not depend on each other: no BatchNorm in train mode."""

    def __init__(self, dim: int = 128) -> None:
        super().__init__()
        norm = torchvision.ops.misc.FrozenBatchNorm2d
        self.network = torchvision.models.resnet18(num_classes=dim, norm_layer=norm)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.network(images.float() / 255), dim=1)


def train(
    student: nn.Module, stream: BalancedStream, epochs: int, lr: float, weight: float = 10.0,
    group: dist.ProcessGroup | None = None,
) -> list[float]:  # fmt: skip
    device = next(student.parameters()).device
    network = DistributedDataParallel(student, process_group=group) if dist.is_initialized() else student
    teacher = ProgressiveTeacher(student, group=group)
    loss = OBDSDLoss(MultiSimilarityLoss(), weight=weight, group=group).to(device)
    optimizer = torch.optim.Adam([*student.parameters(), *loss.parameters()], lr, fused=True)
    history = []
    for ramp in (epoch / epochs for epoch in range(epochs)):
        for batch in stream:
            images, labels = batch[0].to(device, non_blocking=True), batch[1].to(device, non_blocking=True)
            targets = teacher(images) if loss.needs_teacher(ramp) else None
            out = loss(network(images), labels, targets, ramp=ramp)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            history.append(out.loss.detach())
        teacher.update(student)
    return torch.stack(history).tolist()


if __name__ == "__main__":
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.manual_seed(0)
    stream = BalancedStream(sys.argv[1], global_batch_size=64, image_size=64)
    losses = train(Student().to("cuda" if gpu else "cpu"), stream, epochs=2, lr=1e-4)
    if dist.get_rank() == 0:
        print(f"{len(losses)} steps, loss {losses[0]:.4f} to {losses[-1]:.4f}")
    dist.destroy_process_group()

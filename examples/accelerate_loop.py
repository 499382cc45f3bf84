"""OBD-SD with Accelerate: torchrun --nproc-per-node 2 examples/accelerate_loop.py SHARDS."""

import sys

import torch
from accelerate import Accelerator
from ddp import Student
from torch import nn

from dist_obdsd import BalancedStream, MultiSimilarityLoss, OBDSDLoss, ProgressiveTeacher


def train(student: nn.Module, stream: BalancedStream, epochs: int, lr: float, weight: float = 10.0) -> list[float]:
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    loss = OBDSDLoss(MultiSimilarityLoss(), weight=weight).to(accelerator.device)
    optimizer = torch.optim.Adam([*student.parameters(), *loss.parameters()], lr, fused=True)
    # The stream gives each rank its own rows already, so it is not prepared; nor is the loss, which is exact by itself.
    student, optimizer = accelerator.prepare(student, optimizer)
    teacher = ProgressiveTeacher(student)
    history = []
    for epoch in range(epochs):
        ramp = epoch / epochs
        for batch in stream:
            images, labels = batch[0].to(accelerator.device), batch[1].to(accelerator.device)
            targets = teacher(images) if loss.needs_teacher(ramp) else None
            out = loss(student(images), labels, targets, ramp=ramp)
            optimizer.zero_grad()
            accelerator.backward(out.loss)
            optimizer.step()
            history.append(out.loss.detach())
        teacher.update(student)
    return torch.stack(history).tolist()


if __name__ == "__main__":
    Accelerator(cpu=not torch.cuda.is_available())  # opens the process group, which the stream asks for its rank
    torch.manual_seed(0)
    losses = train(Student(), BalancedStream(sys.argv[1], global_batch_size=64, image_size=64), epochs=2, lr=1e-4)
    print(f"{len(losses)} steps, loss {losses[0]:.4f} to {losses[-1]:.4f}")

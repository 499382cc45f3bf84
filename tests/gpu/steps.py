"""Training steps: as exact as their precision allows, without waiting for the device, masked where they must be."""

import torch

from dist_obdsd.training.train_step import DelayedMetrics
from tests.gpu.rig import (
    CPU,
    CheckError,
    Gradients,
    Numbers,
    Rig,
    Skipped,
    convolutions_in_float32,
    distance,
    same_bits,
    settings,
    within,
)
from tests.shadow import Shadow, tensors_of

VARIANTS = ("none", "psd", "obdsd")
LIMITS = {
    ("small_cnn", "float32"): (1e-4, 1e-4),
    ("small_cnn", "tf32"): (2e-2, 1e-1),
    ("small_cnn", "bf16"): (1e-1, 1.5e-1),
    ("resnet18", "float32"): (1e-3, 2e-2),
    ("resnet18", "tf32"): (5e-2, 5e-1),
    ("resnet18", "bf16"): (2e-1, 8e-1),
}
"""Of the losses' and of the gradient's relative error. On a CPU the gradient's was 1.5e-6 and 3.5e-2 in the small CNN,
1.4e-3 and 3.6e-1 in ResNet-18, whose untrained layers amplify rounding; tf32 lies between the two."""
GENTLE = ("distillation.transition_temperature=30", "distillation.omega=0.3")
"""A walk that forgets at once where it began: its diffusion needs no solver, which would look at what it has so far."""


def step_is_exact(device: torch.device, quick: bool) -> str:
    """Losses and gradients of one step beside those of the same step in float64 on the CPU."""
    found = []
    for backbone in ("small_cnn",) if quick else ("small_cnn", "resnet18"):
        for variant in VARIANTS:
            target = f"distillation.target={variant}"
            wanted, wanted_gradients = _one_step(CPU, backbone, target, "precision=float64")
            for precision in ("float32", "bf16", *(["tf32"] if device.type == "cuda" else [])):
                overrides = [target, f"precision={'bf16' if precision == 'bf16' else 'float32'}"]
                if precision == "float32":
                    with convolutions_in_float32():
                        numbers, gradients = _one_step(device, backbone, *overrides)
                else:
                    numbers, gradients = _one_step(device, backbone, *overrides)
                losses, slopes = LIMITS[backbone, precision]
                for name in [name for name in ("ranking", "distillation") if name in wanted]:
                    error = abs(numbers[name] - wanted[name]) / abs(wanted[name])
                    within(f"{backbone} {variant} {precision}: error of {name}", error, losses)
                error = distance(gradients, wanted_gradients)
                said = within(f"{backbone} {variant} {precision}: error of the gradient", error, slopes)
                if variant == "obdsd":
                    found.append(said.replace("error of the ", ""))
    return "; ".join(found)


def _one_step(device: torch.device, backbone: str, *overrides: str) -> tuple[Numbers, Gradients]:
    rig = Rig(settings(backbone, *overrides), device)
    numbers = rig.numbers()
    if numbers["masked"]:
        raise CheckError(f"the step with {', '.join(overrides)} was masked")
    return numbers, rig.gradients


def step_does_not_wait(device: torch.device, quick: bool) -> str:
    """No number comes back to the host inside a step, and none goes to the device in a way that waits.

    A GPU itself complains where something waits for it (``torch.cuda.set_sync_debug_mode``); on a CPU every operation
    is looked at. An event in the queue may be waited for: the device has more to do by then.
    """
    for variant in VARIANTS:
        for more in ([], ["batch.chunk=8"], ["optim.clip_norm=1"]):
            config = settings("small_cnn", f"distillation.target={variant}", "precision=bf16", *GENTLE, *more)
            rig = Rig(config, device)
            rig.keeps_gradients = False
            reader = DelayedMetrics(lag=100)
            for _ in range(3):
                rig.take()
            if device.type == "cuda":
                _on_gpu(rig, reader)
                continue
            batch = rig.batch()
            with Shadow(tensors_of(rig.step)) as shadow:
                rig.take(batch)
            if shadow.found:
                raise CheckError(f"a step of {variant} waits {len(shadow.found)} times: {', '.join(shadow.found)}")
    return "no operation of a step makes the host wait"


def _on_gpu(rig: Rig, reader: DelayedMetrics) -> None:
    batches = []
    for t in range(3):
        batches.append(rig.batch(t))
        rig.taken += 1
    rig.taken -= len(batches)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            names, numbers = rig.take(batch)
            list(reader.push({}, names, numbers))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    values = [dict(read) for _, read in reader.drain()]
    if len(values) != len(batches) or any(value["masked"] for value in values):
        raise CheckError(f"of {len(batches)} steps {len(values)} came back, or one of them was masked")


def masked_step_changes_nothing(device: torch.device, quick: bool) -> str:
    """A step with a NaN leaves every bit of weights and optimizer as it was; the next step goes on from there."""
    tensors = 0
    for name in ("adam", "adamw", "sgd"):
        for precision in ("float32", "bf16"):
            rig = Rig(settings("small_cnn", f"optim.name={name}", f"precision={precision}"), device)
            rig.take()
            bias = rig.student.head.bias
            kept = bias.detach().clone()
            before = rig.state()
            tensors = len(before)
            with torch.no_grad():
                bias.fill_(torch.nan)
            masked = rig.numbers()["masked"]
            with torch.no_grad():
                bias.copy_(kept)
            after = rig.state()
            if masked != 1 or not same_bits(after, before):
                changed = [name for name in before if not torch.equal(after[name], before[name])]
                raise CheckError(f"{name} in {precision}: masked is {masked:.0f} and {changed[:3]} changed")
            if rig.numbers()["masked"] or same_bits(rig.state(), before):
                raise CheckError(f"{name} in {precision}: the step after the masked one did nothing")
    return f"the same bits in {tensors} tensors, with Adam, AdamW and SGD"


def layout_and_chunks_change_nothing(device: torch.device, quick: bool) -> str:
    """channels_last beside contiguous images, chunks beside a whole batch: one gradient. And the memory they take."""
    backbone = "small_cnn" if quick else "resnet18"
    gradients, peaks = {}, {}
    ways = {"plain": [], "contiguous": ["model.channels_last=false"], "chunks": ["batch.chunk=8"]}
    for way, overrides in ways.items():
        with convolutions_in_float32():
            rig = Rig(settings(backbone, *overrides), device)
            rig.take()
            gradients[way] = rig.gradients
            peaks[way] = _peak_mib(rig)
    slopes = LIMITS[backbone, "float32"][1]
    said = [
        within(f"{backbone} {way}: difference", distance(gradients[way], gradients["plain"]), slopes)
        for way in ("contiguous", "chunks")
    ]
    if device.type == "cuda":
        said.append(f"peak {peaks['plain']:.0f} MiB at once, {peaks['chunks']:.0f} MiB in chunks")
    return "; ".join(said)


def compiled_step_is_the_same(device: torch.device, quick: bool) -> str:
    """The gradient of a compiled student that learns from a compiled teacher, beside that of both as they are."""
    if quick and device.type == "cpu":
        raise Skipped("compiling for a CPU takes half a minute; it is checked without --quick")
    backbone = "small_cnn" if quick else "resnet18"
    with convolutions_in_float32():
        plain, compiled = (
            _one_step(device, backbone, "precision=float32", f"model.compile={choice}") for choice in ("false", "true")
        )
    losses, slopes = LIMITS[backbone, "float32"]
    error = abs(compiled[0]["distillation"] / plain[0]["distillation"] - 1)
    said = within(f"{backbone}: difference of the distillation", error, losses)
    return f"{said}; {within('of the gradient', distance(compiled[1], plain[1]), slopes)}"


def _peak_mib(rig: Rig) -> float:
    if rig.device.type != "cuda":
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    rig.take()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20

"""DeepSpeed's engine, ZeRO stage 1 or 2. The only module that knows DeepSpeed.

Weights and gradients stay in float32 (``precision: bf16`` is autocast inside the network, as under DDP), so a step is
DDP's up to the order of sums. A rank holds the optimizer's state of its share of the weights, which checkpoints collect
by parameter name. DeepSpeed's own checkpoints, which are pickles, are neither written nor read.
"""

import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_obdsd.config.sections import REFUSED_STAGES
from dist_obdsd.distributed.collectives import assert_equal_across_ranks
from dist_obdsd.distributed.failures import raise_on_all_ranks
from dist_obdsd.distributed.launch import Runtime
from dist_obdsd.errors import InputError
from dist_obdsd.models.precision import autocast
from dist_obdsd.training.strategy import States, Strategy

SET_BY_CONFIG = {
    "train_batch_size": "batch.global_size",
    "train_micro_batch_size_per_gpu": "batch.global_size",
    "gradient_accumulation_steps": "batch.chunk",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "fp16": "precision",
    "bf16": "precision",
    "torch_autocast": "precision",
}
"""Key of a DeepSpeed file that must not be there -> the setting that decides it."""


class DeepSpeedStrategy(Strategy):
    """DeepSpeed's engine around the student."""

    def _wrap(self, runtime: Runtime) -> nn.Module:
        with raise_on_all_ranks("reading the DeepSpeed file"):
            options = engine_options(self.config.deepspeed.config, self.config.deepspeed.stage)
        assert_equal_across_ranks("the DeepSpeed file", json.dumps(options, sort_keys=True), InputError)
        try:
            import deepspeed
            from deepspeed.utils import logger
        except ImportError as error:
            raise InputError(f"strategy=deepspeed but deepspeed cannot be imported ({error}); install it") from error
        logger.setLevel(logging.WARNING)
        if runtime.device.type == "cpu":
            # An all-reduce over shared memory, which would be compiled at the first start and serves one host alone.
            deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)
        os.environ.setdefault("LOCAL_RANK", str(runtime.launch.local_rank))  # DeepSpeed insists; srun does not set it
        # DeepSpeed sends and keeps weights as flat rows, so a layout with channels innermost ends here.
        for name, p in self.parameters:
            if not p.dim():
                raise InputError(f"DeepSpeed cannot send the network's {name}, a single number; set strategy=fsdp")
            # Not ``contiguous``: a kernel of 1 x 1 is contiguous by name in either layout, with strides that differ.
            p.data = p.data.flatten().view(p.shape)
        # DeepSpeed replaces each group's parameters by one flat share of them.
        self._groups = {p: i for i, group in enumerate(self.optimizer.param_groups) for p in group["params"]}
        options["train_micro_batch_size_per_gpu"] = self.config.batch.global_size // runtime.world_size
        self._engine, *_ = deepspeed.initialize(
            # The engine turns autocast off around its module, so the module turns it on inside.
            model=_Autocast(self),
            optimizer=self.optimizer,
            model_parameters=[p for _, p in self.parameters],
            config=options,
            dist_init_required=False,
        )
        return self._engine

    def _forward(self, network: nn.Module, images_bCss: torch.Tensor) -> torch.Tensor:
        if network is self.student:
            return super()._forward(network, images_bCss)
        return network(images_bCss)

    def _backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)

    @contextmanager
    def _unsynced(self) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self._engine.set_gradient_accumulation_boundary(True)

    def _clipped_norm(self, own: list[nn.Parameter]) -> torch.Tensor:
        zero, limit = self._engine.optimizer, self.config.optim.clip_norm
        student = torch.as_tensor(zero.scaled_global_norm(), device=self.device)
        student = torch.where(student < 0, torch.nan, student)  # DeepSpeed's -1 stands for NaN or infinity
        if not own:
            zero.clip_grad = limit or 0.0  # it clips inside its step
            return student
        theirs = nn.utils.get_total_norm([p.grad for p in own if p.grad is not None])
        norm = torch.hypot(student, theirs)
        if limit is not None:
            nn.utils.clip_grads_with_norm_(own, limit, norm)
            # DeepSpeed divides by max(1, its norm / clip_grad); let that be by the whole gradient's norm.
            ratio = float(student / norm)
            zero.clip_grad = limit * ratio if math.isfinite(ratio) and ratio > 0 else 0.0
        return norm

    def _take_step(self) -> None:
        self._engine.step()

    def _optimizer_state(self) -> States:
        from deepspeed.utils import safe_get_full_optimizer_state

        # DeepSpeed links weights with their state after its first group's first step, when the others have none.
        zero = self._engine.optimizer
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
        states: States = {}
        for name, p in self.parameters:
            flat = self._flat(p)
            shared = self.optimizer.state.get(flat, {})
            # A rank knows the names from its own share; every rank holds one, if only of padding.
            states[name] = {
                key: safe_get_full_optimizer_state(p, key).cpu() if value.shape == flat.shape else value.clone()
                for key, value in shared.items()
            }
        return {name: state for name, state in states.items() if state}

    def _load_optimizer(self, states: States) -> None:
        self._engine.optimizer.refresh_fp32_params()  # the weights were loaded beside its own copy of them
        for name, p in self.parameters:
            flat = self._flat(p)
            for key, value in states.get(name, {}).items():
                kept = self.optimizer.state[flat]
                if value.shape != p.shape or not value.dim():
                    kept[key] = value.to(flat.device)
                    continue
                kept.setdefault(key, torch.zeros_like(flat))
                mapping = p._hp_mapping  # type: ignore[attr-defined]
                if mapping is not None:
                    here, there = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
                    part = value.flatten().narrow(0, here.start, here.numel)
                    kept[key].narrow(0, there.start, there.numel).copy_(part)

    def _flat(self, p: nn.Parameter) -> torch.Tensor:
        """This rank's flat share of the float32 weights that ``p`` is a part of."""
        return self._engine.optimizer.single_partition_of_fp32_groups[self._groups[p]]


class _Autocast(nn.Module):
    """The student, in the config's precision."""

    def __init__(self, strategy: DeepSpeedStrategy) -> None:
        super().__init__()
        self.student, self._config, self._device = strategy.student, strategy.config, strategy.device

    def forward(self, images_bCss: torch.Tensor) -> torch.Tensor:
        with autocast(self._config, self._device):
            return self.student(images_bCss)


def engine_options(path: str | None, stage: int | None) -> dict[str, Any]:
    """Read and check a DeepSpeed file, and add what this program sets itself.

    Args:
        path: a DeepSpeed JSON file; None for DeepSpeed's defaults.
        stage: of ZeRO, 1 or 2; None takes the file's, or 1.

    Raises:
        InputError: the file cannot be read, sets what the config decides, or asks for another or an unsupported stage.
    """
    try:
        options = {} if path is None else json.loads(Path(path).read_text())
    except OSError as error:
        raise InputError(f"cannot read deepspeed.config {path}: {error.strerror}; check the path") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}; see launch/zero1.json for an example") from error
    if not isinstance(options, dict) or not isinstance(options.get("zero_optimization", {}), dict):
        raise InputError(f"{path} is not a DeepSpeed configuration; see launch/zero1.json for an example")
    for key in sorted(options.keys() & SET_BY_CONFIG.keys()):
        raise InputError(
            f"{path} sets {key}, which {SET_BY_CONFIG[key]} decides in the config; take it out of the file"
        )
    zero = options.setdefault("zero_optimization", {})
    found = zero.get("stage")
    if stage is not None and found not in (None, stage):
        raise InputError(f"deepspeed.stage is {stage} but {path} has stage {found}; set one of them")
    zero["stage"] = stage or (1 if found is None else found)
    if zero["stage"] not in (1, 2):
        raise InputError(f"{path} has ZeRO stage {zero['stage']}: {REFUSED_STAGES.get(zero['stage'], 'set 1 or 2')}")
    for key in zero.keys() & {"offload_optimizer", "offload_param", "cpu_offload"}:
        raise InputError(f"{path} sets zero_optimization.{key}, which is not supported; take it out")
    return options | {
        "zero_allow_untested_optimizer": True,  # torch's own, which the masked step needs
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # ``_clipped_norm`` decides; DeepSpeed's default would clip at 1
        "steps_per_print": None,
    }

"""The state of a comparison's runs, read from their folders."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dist_obdsd.config import changed_settings, load_config
from dist_obdsd.data.manifest import Manifest
from dist_obdsd.errors import InputError
from dist_obdsd.experiments.variants import RunSpec
from dist_obdsd.training.run_dir import read_json, read_status

FINISHED, HALF_DONE, NEW = "finished", "half-done", "not started"


@dataclass(frozen=True)
class RunStatus:
    """One run, and what it left."""

    spec: RunSpec
    state: str
    """finished, failed, preempted, half-done or not started."""
    message: str
    summary: dict[str, Any]
    """The run's ``summary.json``; empty unless it is finished."""
    provenance: dict[str, Any]


def status_of(spec: RunSpec) -> RunStatus:
    """Look at a run's folder."""
    if not (spec.run_dir / "config.yaml").exists():
        return RunStatus(spec, NEW, "", {}, {})
    summary, provenance = (read_json(spec.run_dir / f"{name}.json") for name in ("summary", "provenance"))
    status = read_status(spec.run_dir)
    state = status.get("state")
    if state == FINISHED and summary and _reached_end(spec, summary):
        return RunStatus(spec, FINISHED, status["message"], summary, provenance)
    stopped = state if state in ("failed", "preempted") else HALF_DONE
    return RunStatus(spec, stopped, status.get("message", ""), {}, provenance)


def _reached_end(spec: RunSpec, summary: dict[str, Any]) -> bool:
    """A run that max_steps ended goes on when there is more to do now."""
    reached = load_config(spec.run_dir / "config.yaml").max_steps == spec.config.max_steps
    return reached or summary["meta"]["epochs"] == spec.config.epochs


def check_folders(specs: Sequence[RunSpec], shards: dict[str, Manifest], ranks: int) -> None:
    """Refuse existing runs that have other settings than their variant."""
    for spec in specs:
        if not (spec.run_dir / "config.yaml").exists():
            continue
        found, wanted = load_config(spec.run_dir / "config.yaml"), spec.config
        changes = changed_settings(found.model_dump(mode="json"), wanted.model_dump(mode="json"))
        # Trained further than wanted; a run that stopped earlier goes on.
        if wanted.max_steps is not None and (found.max_steps is None or found.max_steps > wanted.max_steps):
            changes.append(f"max_steps: {found.max_steps} -> {wanted.max_steps}")
        provenance = read_json(spec.run_dir / "provenance.json")
        digest = shards[wanted.data.shards].digest
        if provenance.get("manifest", digest) != digest:
            changes.append(f"manifest of the shards: {provenance['manifest'][:12]} -> {digest[:12]}")
        by_rank = wanted.distillation.scope == "rank" or wanted.model.norm == "batch"
        if by_rank and int(provenance.get("world_size", ranks)) != ranks:
            changes.append(f"ranks, on which these settings depend: {provenance['world_size']} -> {ranks}")
        if changes:
            raise InputError(
                f"{spec.run_dir} was trained with other settings than the variant {spec.label} with seed {spec.seed} "
                f"({'; '.join(changes)}); use those, set another name, or remove the folder"
            )

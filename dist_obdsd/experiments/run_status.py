"""What has become of the runs of a comparison, as their folders say."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_obdsd.config import Config, changed_settings, load_config
from dist_obdsd.data import manifest as manifests
from dist_obdsd.data.manifest import Manifest
from dist_obdsd.errors import InputError
from dist_obdsd.experiments.variants import Child
from dist_obdsd.training.run_dir import read_status

FINISHED, HALF_DONE, NEW = "finished", "half-done", "not started"


@dataclass(frozen=True)
class Outcome:
    """What has become of a run."""

    child: Child
    state: str
    """finished; or failed, preempted, half-done, not started."""
    message: str
    summary: dict[str, Any]
    """Of a finished run; else empty."""
    provenance: dict[str, Any]


def read_shards(children: Sequence[Child]) -> dict[str, Manifest]:
    """The manifests by ``data.shards``; arms may be about different data."""
    return {where: manifests.load(where) for where in dict.fromkeys(c.settings.data.shards for c in children)}


def read_json(path: Path) -> dict[str, Any]:
    """A file of a run folder; empty where it is not there or was not written whole."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def state_of(child: Child) -> str:
    if not (child.run_dir / "config.yaml").exists():
        return NEW
    summary = read_json(child.run_dir / "summary.json")
    if read_status(child.run_dir).get("state") != FINISHED or not summary:
        return HALF_DONE
    # A run that max_steps ended goes on when there is more to do now.
    reached = load_config(child.run_dir / "config.yaml").max_steps == child.settings.max_steps
    return FINISHED if reached or summary["meta"]["epochs"] == child.settings.epochs else HALF_DONE


def outcome_of(child: Child) -> Outcome:
    state, status = state_of(child), read_status(child.run_dir)
    if state == HALF_DONE and status.get("state") in ("failed", "preempted"):
        state = status["state"]
    summary = read_json(child.run_dir / "summary.json") if state == FINISHED else {}
    return Outcome(child, state, status.get("message", ""), summary, read_json(child.run_dir / "provenance.json"))


def check_folders(children: Sequence[Child], shards: dict[str, Manifest], ranks: int) -> None:
    """Refuse runs that differ from what their arm declares: what they say would be put down to the arm.

    Raises:
        InputError: with what differs, of the first such run.
    """
    for child in children:
        if not (child.run_dir / "config.yaml").exists():
            continue
        found, wanted = load_config(child.run_dir / "config.yaml"), child.settings
        changes = changed_settings(found.model_dump(mode="json"), wanted.model_dump(mode="json"))
        # Trained further than wanted; a run that stopped earlier goes on.
        if wanted.max_steps is not None and (found.max_steps is None or found.max_steps > wanted.max_steps):
            changes.append(f"max_steps: {found.max_steps} -> {wanted.max_steps}")
        provenance = read_json(child.run_dir / "provenance.json")
        digest = shards[wanted.data.shards].digest
        if provenance.get("manifest", digest) != digest:
            changes.append(f"manifest of the shards: {provenance['manifest'][:12]} -> {digest[:12]}")
        if depends_on_ranks(wanted) and int(provenance.get("world_size", ranks)) != ranks:
            changes.append(f"ranks, on which these settings depend: {provenance['world_size']} -> {ranks}")
        if changes:
            raise InputError(
                f"{child.run_dir} was trained with other settings than the arm {child.label} with seed {child.seed} "
                f"declares ({'; '.join(changes)}); use those, set another name, or remove the folder"
            )


def depends_on_ranks(settings: Config) -> bool:
    return settings.distillation.scope == "rank" or settings.model.norm == "batch"

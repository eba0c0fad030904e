"""Stored copies of power averages, and the average of another width made of them after training."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from pipelines.engine.profiles import combine, gamma_of
from pipelines.engine.saving import sync_folder, write_tensors

_NAME = re.compile(r"step-(\d+)-sigma-(0\.\d+)\.safetensors")


class Snapshots:
    """The files `step-*-sigma-*.safetensors` of a folder, one for each step and width, in float16."""

    def __init__(self, folder: Path):
        self._folder = folder

    def store(self, step: int, sigma_rel: float, weights: Mapping[str, torch.Tensor]) -> None:
        """Add one, whole or not at all."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step-{step:08d}-sigma-{sigma_rel}.safetensors"
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        write_tensors(temporary, {name: value.half() for name, value in weights.items()}, {})
        os.replace(temporary, path)
        sync_folder(self._folder)

    def forget(self, after: int) -> None:
        """Delete those of steps after this one: the run went on from its weights, and what they average was given up."""
        for step, _, path in self._found():
            if step > after:
                path.unlink(missing_ok=True)

    def synthesise(self, sigma_rel: float, step: int) -> dict[str, torch.Tensor]:
        """The average of this width over the first `step` steps, fp32, as nearly as the snapshots up to there allow.

        FileNotFoundError where there is none of that step: a profile that ends later than all snapshots cannot be made.
        """
        found = [each for each in self._found() if each[0] <= step]
        if step not in {each[0] for each in found}:
            raise FileNotFoundError(f"{self._folder}: no snapshot of step {step} among {sorted({each[0] for each in found})}")
        factors = combine([each[0] for each in found], [gamma_of(each[1]) for each in found], step, gamma_of(sigma_rel))
        total: dict[str, torch.Tensor] = {}
        for (*_, path), factor in zip(found, factors, strict=True):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 no mapping
                    part = file.get_tensor(name).float() * float(factor)
                    total[name] = total[name].add_(part) if name in total else part
        return total

    def _found(self) -> list[tuple[int, float, Path]]:
        """Step, width and file of each."""
        paths = sorted(self._folder.glob("step-*.safetensors"))
        return [(int(match[1]), float(match[2]), path) for path in paths if (match := _NAME.fullmatch(path.name))]

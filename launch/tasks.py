"""Which part of the work is this process's, by what SLURM arrays, AWS Batch and Kubernetes indexed jobs leave in the environment."""

from __future__ import annotations

from collections.abc import Mapping

TASKS = "FOLEYSCALE_TASKS"
"""Variable with the number of all tasks; it decides where it is set."""
_SLURM, _BATCH, _KUBERNETES = "SLURM_ARRAY_TASK_ID", "AWS_BATCH_JOB_ARRAY_INDEX", "JOB_COMPLETION_INDEX"


def task_from_environment(environ: Mapping[str, str]) -> tuple[int, int] | None:
    """The task (i, n), 0 <= i < n, that an array job made this process, or None where it is no part of an array.

    Raises ValueError where the environment leaves open which task it is; the message says what to pass.
    """
    name = next((name for name in (_SLURM, _BATCH, _KUBERNETES) if environ.get(name)), None)
    if name is None:
        if environ.get(TASKS):
            wanted = ", ".join((_SLURM, _BATCH, _KUBERNETES))
            raise ValueError(f"{TASKS} is set, but none of {wanted} says which task this is: start an array job, or pass --task I/N")
        return None
    index = _number(environ, name)
    if environ.get(TASKS):
        # Only this tells a part that was submitted again, as in --array=3,7, from an array of its own.
        count = _number(environ, TASKS)
    elif name == _SLURM:
        index, count = _place_in_array(environ, index)
    elif name == _BATCH:
        count = _number(environ, "AWS_BATCH_JOB_ARRAY_SIZE")
    else:
        raise ValueError(f"{_KUBERNETES} is {index}, but not of how many: {_remedy('spec.completions of the job')}")
    if not 0 <= index < count:
        raise ValueError(f"{name} makes this task {index} of {count}, which are counted from 0: number the tasks 0 to {count - 1}")
    return index, count


def _place_in_array(environ: Mapping[str, str], task: int) -> tuple[int, int]:
    """Place and length in a SLURM array that begins at 0 or 1 and has no gaps."""
    first, last, step, count = (_number(environ, f"SLURM_ARRAY_TASK_{name}") for name in ("MIN", "MAX", "STEP", "COUNT"))
    if first > 1 or step < 1 or (last - first) // step + 1 != count or (task - first) % step:
        raise ValueError(f"the SLURM array has {count} tasks from {first} to {last} in steps of {step}, which looks like a part of a "
                         f"larger one: {_remedy('the number of all tasks')}")  # fmt: skip
    return (task - first) // step, count


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{name} is {text!r}, not a number: {_remedy('the number of all tasks')}")
    return int(text)


def _remedy(count: str) -> str:
    return f"export {TASKS} as {count}, or pass --task I/N"

"""Tasks from the environment of array jobs: every array covers 0 to n - 1 once, and what is not certain is an error."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.tasks import task_from_environment

counts = st.integers(1, 1000)


def slurm(ids: list[int], step: int = 1) -> list[dict[str, str]]:
    """What SLURM sets in each task of an array; a list of ids has step 1 there, even one that is evenly spaced."""
    array = {"MIN": min(ids), "MAX": max(ids), "STEP": step, "COUNT": len(ids)}
    return [{f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in (array | {"ID": task}).items()} for task in ids]


@given(count=counts, first=st.integers(0, 1), step=st.integers(1, 50))
def test_a_slurm_array_without_gaps_is_counted_from_0(count, first, step):
    ids = [first + step * place for place in range(count)]
    assert [task_from_environment(environ) for environ in slurm(ids, step)] == [(place, count) for place in range(count)]


@given(count=counts, data=st.data())
def test_a_part_submitted_again_keeps_its_numbers(count, data):
    part = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=20)))
    tasks = [task_from_environment(environ | {"FOLEYSCALE_TASKS": str(count)}) for environ in slurm(part)]
    assert tasks == [(task, count) for task in part]


@given(part=st.sets(st.integers(0, 1000), min_size=1, max_size=20))
def test_a_part_is_never_renumbered_by_guess(part):
    ids = sorted(part)
    whole = ids[0] <= 1 and ids == list(range(ids[0], ids[0] + len(ids)))
    for place, environ in enumerate(slurm(ids)):
        if whole:
            assert task_from_environment(environ) == (place, len(ids))
        else:
            with pytest.raises(ValueError, match="a part of a larger one: export FOLEYSCALE_TASKS as .*, or pass --task I/N"):
                task_from_environment(environ)


@given(count=counts, data=st.data())
def test_aws_batch_and_kubernetes(count, data):
    index = data.draw(st.integers(0, count - 1))
    batch = {"AWS_BATCH_JOB_ARRAY_INDEX": str(index), "AWS_BATCH_JOB_ARRAY_SIZE": str(count)}
    assert task_from_environment(batch) == (index, count)
    assert task_from_environment({"JOB_COMPLETION_INDEX": str(index), "FOLEYSCALE_TASKS": str(count)}) == (index, count)


@given(st.dictionaries(st.sampled_from(("HOME", "SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID", "AWS_BATCH_JOB_ID", "JOB_COMPLETION_INDEX")),
                       st.text("0123456789-x٣", max_size=3)))  # fmt: skip
def test_any_environment_gives_a_task_nothing_or_a_value_error(environ):
    try:
        task = task_from_environment(environ)
    except ValueError:
        return
    assert task is None and not environ.get("SLURM_ARRAY_TASK_ID") and not environ.get("JOB_COMPLETION_INDEX")


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"JOB_COMPLETION_INDEX": "3"}, "JOB_COMPLETION_INDEX is 3, but not of how many: export FOLEYSCALE_TASKS as spec.completions"),
        ({"AWS_BATCH_JOB_ARRAY_INDEX": "3"}, "AWS_BATCH_JOB_ARRAY_SIZE is '', not a number: export FOLEYSCALE_TASKS"),
        ({"SLURM_ARRAY_TASK_ID": "4", "FOLEYSCALE_TASKS": "4"}, "SLURM_ARRAY_TASK_ID makes this task 4 of 4, .* number the tasks 0 to 3"),
        ({"SLURM_ARRAY_TASK_ID": "4", "FOLEYSCALE_TASKS": "all"}, "FOLEYSCALE_TASKS is 'all', not a number"),
        ({"FOLEYSCALE_TASKS": "4"}, "none of SLURM_ARRAY_TASK_ID, AWS_BATCH_JOB_ARRAY_INDEX, JOB_COMPLETION_INDEX says which task this is"),
    ],
)
def test_what_is_missing_is_named(environ, message):
    with pytest.raises(ValueError, match=message):
        task_from_environment(environ)

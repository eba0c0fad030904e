"""The table of contrastive encoders that differ from the recipe's in one thing."""

import json

import pytest

from benchmarks import factors
from pipelines.recipes import load_recipe


def made_training(out, variant, seed, *validations, finished=True):
    folder = out / "factors" / variant / f"seed-{seed}" / "contrastive"
    folder.mkdir(parents=True)
    lines = [{"step": 1, "loss": 2.0}, *({"step": 50, "validation/r@1": r, "validation/right_segment": s} for r, s in validations)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    if finished:
        (folder / "export").mkdir()
        (folder / "export" / "complete.json").touch()


def test_differences_are_paired_by_seed(tmp_path):
    for seed in (0, 1):
        made_training(tmp_path, "recipe", seed, (0.1, 0.1), (0.5 + 0.2 * seed, 0.6))
        made_training(tmp_path, "one-segment", seed, (0.45 + 0.2 * seed, 0.3))
    made_training(tmp_path, "one-segment", 2, (0.9, 0.9), finished=False)
    text = factors.table(tmp_path)
    assert (tmp_path / "factors.md").read_text() == text and "2 seeds" in text
    assert "| recipe | 0.6 ± 0.1 | – | 0.6 ± 0 | – |" in text
    assert "| one-segment | 0.55 ± 0.1 | -0.05 ± " in text and "| 0.3 ± 0 | -0.3 ± 0 |" in text


@pytest.mark.parametrize("changes", factors.VARIANTS.values())
def test_every_variant_sees_as_many_segments(changes):
    config = load_recipe("rendered", changes).contrastive
    assert config.segments * config.train.batch_size == 32


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(ValueError, match="give `python -m benchmarks.learning run .*` first"):
        factors.run(tmp_path, 4, [])
    made_training(tmp_path, "recipe", 0)
    with pytest.raises(ValueError, match="metrics.jsonl: no validation in it; give `python -m benchmarks.factors run` again"):
        factors.table(tmp_path)

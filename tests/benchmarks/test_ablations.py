"""The table and the curves of a sweep, from a sweep.csv that was made up."""

import pytest

from benchmarks import ablations

CSV = """variant,seed,round,sign,value,error,difference,difference_error
base,0,0,reward,0.3,0.02,,
base,0,1,reward,0.4,0.02,,
base,0,1,onset_f1,0.7,0.01,,
base,0,1,drift,2.0,,,
mean,0,1,reward,0.5,0.03,,
mean,0,1,onset_f1,0.65,0.02,-0.05,0.015
"""


def test_the_last_rounds_stand_beside_the_first_variant(tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.csv").write_text(CSV)
    rows = ablations.read(tmp_path)
    assert {row.sign for row in rows} == {"reward", "onset_f1"}
    assert ablations.table(rows).splitlines() == [
        "| variant | seed | round | reward | minus base | onset F1 | minus base | flow loss | minus base |",
        "|---|---|---|---|---|---|---|---|---|",
        "| base | 0 | 1 | 0.4000 ± 0.0200 | – | 0.7000 ± 0.0100 | – | – | – |",
        "| mean | 0 | 1 | 0.5000 ± 0.0300 | – | 0.6500 ± 0.0200 | -0.0500 ± 0.0150 | – | – |",
    ]


def test_without_a_sweep_it_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match=r"sweep.csv: not there; give `foleyscale sweep .* preference` first"):
        ablations.read(tmp_path)

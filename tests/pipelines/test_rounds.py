"""Preference rounds that run themselves: each part once, the same after a kill anywhere and in any number of processes."""

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from pipelines.engine.checkpoint import weights_hash
from pipelines.engine.world import World
from pipelines.folders import StageFolders
from pipelines.provenance import ProvenanceError, claim
from pipelines.recipes import load_recipe
from pipelines.rounds import Rounds
from pipelines.sounding import generator_export
from tests.fixtures.tiny_chain import STEPS, finish, losses, overrides, start

ALONE = World(0, 1, torch.device("cpu"))
ROUNDS = 2
CHANGES = (f"preference.rounds={ROUNDS}", "preference.videos=24", "evaluation.clips=4", "preference.train.optimiser.lr=2e-5")
"""Three shards of candidates in each round, four held-out clips to watch them by, and steps small enough that a generator which
has hardly begun does not drift off."""


def command(out, shards, *more, processes=1):
    """The command line of the rounds alone."""
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    arguments = [*overrides(out, shards), *CHANGES, *more]
    return [sys.executable, "-W", "ignore", *launcher, "-m", "launch.cli", "train", "preference", "demo", *arguments]


def begun(tiny, out):
    """A run in `out` with all that comes before its rounds."""
    for name in ("autoencoder", "contrastive", "features", "generative"):
        shutil.copytree(tiny.run / name, out / "run" / name)
    return out / "run" / "preference"


def candidates(preference):
    """sha256 of every shard of candidates: keys, seeds, scores and losers."""
    return {str(path.relative_to(preference)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(preference.glob("round-*/candidates/*.tar"))}


def records(preference):
    """What the rounds have left, but for the times."""
    names = ["best.json", "rounds.jsonl", "start/signs.json", *(f"round-{number}/signs.json" for number in range(1, ROUNDS + 1))]
    weights = {str(path.relative_to(preference)): weights_hash(path) for path in preference.glob("round-*/export")}
    trained = {name: lines for name, lines in losses(preference.parent).items() if name.startswith("preference/")}
    return candidates(preference), trained, weights, {name: (preference / name).read_text() for name in names}


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    """The undisturbed run."""
    out = tmp_path_factory.mktemp("rounds")
    preference = begun(tiny, out)
    output = finish(start(command(out, tiny.shards)))
    return SimpleNamespace(out=out, run=out / "run", preference=preference, output=output)


@pytest.mark.slow
def test_every_part_of_every_round_is_there(done):
    assert len(candidates(done.preference)) == 3 * ROUNDS
    trained = losses(done.run)
    for number in range(1, ROUNDS + 1):
        assert [line["step"] for line in trained[f"preference/round-{number}"] if "loss" in line] == list(range(1, STEPS + 1))
    lines = [json.loads(line) for line in (done.preference / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2] and {line["clips"] for line in lines} == {4}
    signs = lines[2]["signs"]
    assert {"reward", "onset_f1", "flow_loss", "retrieval", "retrieval_chance", "distance", "drift", "spread", "inverted",
            "reward_above_true", "reward_since_start", "onset_f1_since_previous", "flow_rise_since_start", "flow_win", "flow_lose",
            "margin_win", "margin_lose", "accuracy"} <= signs.keys()  # fmt: skip
    assert signs["retrieval_chance"]["value"] == 0.25 and 0 <= signs["inverted"]["value"] <= 1
    assert 0 < signs["drift"]["value"] < 0.1, "six small steps move the latents a little"
    assert signs["distance"]["value"] == pytest.approx(lines[0]["signs"]["distance"]["value"], rel=0.2)
    first = json.loads((done.preference / "start" / "signs.json").read_text())["signs"]
    again = json.loads((done.preference / "round-1" / "signs.json").read_text())["signs"]
    assert again["flow_loss"]["value"] == pytest.approx(first["flow_loss"]["value"], rel=0.05)
    assert again["flow_loss"] != first["flow_loss"]


@pytest.mark.slow
def test_the_best_round_is_what_is_used(done):
    best = json.loads((done.preference / "best.json").read_text())
    assert best["measure"] == "reward" and best["reason"] in done.output
    name = f"preference/round-{best['round']}" if best["round"] else "generative"
    assert generator_export(done.run) == done.run / name / "export"


@pytest.mark.parametrize("losers", ["distorted", "candidates"])
def test_a_round_does_not_go_on_from_another_start(tiny, tmp_path, losers):
    """Refused before anything of the round is made: its folder is all that is there."""
    shutil.copytree(tiny.run, tmp_path / "run", ignore=shutil.ignore_patterns("preference", "checkpoints"))
    recipe = load_recipe("demo", [*overrides(tmp_path, tiny.shards), f"preference.losers={losers}"])
    folder, start_of = recipe.folder / "preference" / "round-1", recipe.folder / "generative" / "export"
    claim(folder, lambda: {"model": weights_hash(start_of)}, ALONE, "")
    with open(start_of / "weights.safetensors", "ab") as file:
        file.write(b"!")
    rounds = Rounds(StageFolders(recipe, ALONE), str(recipe.folder / "features" / "shards"))
    with pytest.raises(ProvenanceError, match=rf"^{folder} was made with another model: delete that folder to make the round again$"):
        rounds._round(1, start_of, "")
    assert [path.name for path in folder.iterdir()] == ["provenance.json"]


def test_a_round_keeps_what_it_started_from(tiny):
    known = json.loads((tiny.run / "preference" / "round-1" / "provenance.json").read_text())
    assert known == {"model": weights_hash(tiny.run / "generative" / "export")}


@pytest.mark.slow
def test_nothing_is_done_twice(tiny, done):
    kept = ("*.tar", "signs.json", "weights.safetensors", "metrics.jsonl")
    before, times = records(done.preference), {path: path.stat().st_mtime_ns for name in kept for path in done.run.rglob(name)}
    output = finish(start(command(done.out, tiny.shards)))
    assert output.count("complete, skipped") == ROUNDS and "better than the start" not in output
    assert records(done.preference) == before and {path: path.stat().st_mtime_ns for path in times} == times
    output = finish(start(command(done.out, tiny.shards, "preference.watch.keep=last")))
    assert f"round {ROUNDS} is kept as the last" in output, "what is measured and by what a round is kept may change at any time"
    assert generator_export(done.run) == done.preference / f"round-{ROUNDS}" / "export"
    finish(start(command(done.out, tiny.shards)))
    assert records(done.preference) == before


def whole_shard(preference):
    return any((preference / "round-1" / "candidates").glob("shard-*.parquet"))


def scoring(preference):
    """Candidates of the next shard are generated and not yet scored: there the run stands still, as `STANDSTILL` makes it."""
    return (preference / "scoring").exists()


def half_a_shard(preference):
    folder = preference / "round-1" / "candidates"
    return any(folder.glob("shard-*.parquet")) and any(path.stat().st_size for path in folder.glob(".shard-*.tmp"))


def training(preference):
    path = preference / "round-1" / "metrics.jsonl"
    return path.exists() and path.read_text().count("\n") >= 3


def measuring(preference):
    return (preference / "round-1" / "export" / "complete.json").exists()


MOMENTS = {
    whole_shard: lambda folder: len(candidates(folder)) < 3,
    scoring: lambda folder: len(candidates(folder)) < 3,
    half_a_shard: lambda folder: len(candidates(folder)) < 3,
    training: lambda folder: not (folder / "round-1" / "export").exists(),
    measuring: lambda folder: not (folder / "round-1" / "signs.json").exists(),
}
"""When the run is killed, and what must not be there yet for the kill to show anything."""
STANDSTILL = """
import pathlib, runpy, sys, time
from pipelines.sounding import SoundModel
marker = pathlib.Path(sys.argv.pop(1))
def similarities(self, segments, waveform):
    marker.write_text(f"{len(waveform)} sounds")
    time.sleep(600)
SoundModel.similarities = similarities
runpy.run_module("launch.cli", run_name="__main__")
"""
"""The command line, but for candidates that are never scored: a file says when it is about to."""


def stopping(arguments, marker):
    """The same command, which stands still where it would score."""
    place = arguments.index("-m")
    return [*arguments[:place], "-c", STANDSTILL, str(marker), *arguments[place + 2:]]


def kill_at(moment, preference, arguments):
    """Run the command until then."""
    process = start(stopping(arguments, preference / "scoring") if moment is scoring else arguments)
    deadline = time.monotonic() + 200
    while not moment(preference):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert MOMENTS[moment](preference), "the kill came too late to show anything"


@pytest.mark.slow
@pytest.mark.parametrize("moments", [(whole_shard, scoring), (half_a_shard,), (training,), (measuring,)],
                         ids=lambda moments: "-".join(moment.__name__ for moment in moments))
def test_a_killed_run_ends_as_the_undisturbed_one(tiny, done, tmp_path, moments):
    """Killed once, or twice: while the candidates of the second shard are generated, and again before they are scored."""
    preference = begun(tiny, tmp_path)
    for moment in moments:
        kill_at(moment, preference, command(tmp_path, tiny.shards))
    finish(start(command(tmp_path, tiny.shards)))
    assert records(preference) == records(done.preference)


@pytest.mark.slow
def test_two_processes_make_the_pairs_of_one(tiny, done, tmp_path):
    preference = begun(tiny, tmp_path)
    finish(start(command(tmp_path, tiny.shards, "preference.rounds=1", processes=2)))
    one = candidates(done.preference)
    assert candidates(preference) == {name: digest for name, digest in one.items() if name.startswith("round-1/")}
    assert (preference / "start" / "signs.json").read_text() == (done.preference / "start" / "signs.json").read_text()
    mine, theirs = ([line["loss"] for line in losses(folder.parent)["preference/round-1"] if "loss" in line]
                    for folder in (preference, done.preference))
    assert mine == pytest.approx(theirs, rel=1e-4)

import json
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from data_prep.index import build_index
from data_prep.shards import ShardWriter
from pipelines.report import read_curves, write_report

HOSTILE = "</script><script>alert('dog & \"cat\"')</script>"
VOID = {"meta", "img"}


def sign(value, error=None):
    """One sign in rounds.jsonl."""
    return {"value": value, "error": error}


ROUNDS = [
    {"round": 0, "clips": 64, "signs": {"reward": sign(0.3, 0.01), "retrieval": sign(0.25), "distance": sign(3.0)}},
    {"round": 1, "clips": 64, "signs": {"reward": sign(0.34, 0.011), "retrieval": sign(0.5), "distance": sign(2.0), "drift": sign(1.5),
                                        "reward_since_start": sign(0.04, 0.01), "accuracy": sign(0.875)}},
    {"round": 2, "clips": 64, "signs": {"reward": sign(None), "retrieval": sign(0.75), "distance": sign(8.0), "drift": sign(7.0),
                                        "accuracy": sign(0.9375)}},
]
BEST = {"round": 1, "measure": "reward", "value": 0.34, "error": 0.011, "reason": "round 1 of 2 is kept by held-out reward (0.34 ± 0.011)",
        "warnings": ["in round 2 sounds are not finite"]}


class Page(HTMLParser):
    """Elements, attributes and text of a document; refuses tags that do not nest."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.attributes, self.text, self._open = [], [], [], []
        self.feed(path.read_text())
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        return " ".join(self.text)


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with every part that a report can show."""
    run = tmp_path_factory.mktemp("runs") / "demo & more"
    for stage in ("contrastive", "preference/round-2", "preference/round-10"):
        rows = [{"step": n, "loss": 1 / n, "learning_rate": 0.1, "seconds_per_step": 0.5, "validation/loss": 2 / n} for n in range(1, 9)]
        write_lines(run / stage / "metrics.jsonl", rows)
    (run / "recipe.yaml").write_text(f"name: demo\ncaption: {HOSTILE}\n")
    (run / "contrastive" / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    candidates = run / "preference" / "round-2" / "candidates"
    with ShardWriter(str(candidates), 0) as writer:
        record = {"seeds": [1, 2, 3], "scores": [0.25, -0.125, None], "loser": 1, "winner": 0, "truth": 0.375}
        writer.add("clip-a", {"round.json": json.dumps(record).encode()})
        writer.add("clip-b", {"round.json": json.dumps(record | {"winner": "truth"}).encode()})
    build_index(str(candidates), {}, expected=1)
    write_lines(run / "preference" / "rounds.jsonl", ROUNDS)
    (run / "preference" / "best.json").write_text(json.dumps(BEST))
    write_lines(run / "sweep" / "base-0" / "preference" / "round-1" / "metrics.jsonl", [{"step": 1, "loss": 1.0}])
    (run / "sweep" / "sweep.html").write_text("variants")
    (run / "examples").mkdir()
    (run / "examples" / "own sound #1.mp4").write_bytes(b"video")
    np.save(run / "examples" / "mel.npy", np.random.default_rng(0).standard_normal((80, 60)).astype(np.float16))
    evaluation = {
        "bars": [{"name": "R@1", "value": 0.2, "bound": 0.156, "comparison": ">=", "passed": True, "explanation": "chance 0.016"},
                 {"name": "L1", "value": 0.5, "bound": 0.35, "comparison": "<=", "passed": False, "explanation": HOSTILE}],
        "figures": [{"name": "onset F1", "value": 0.4123456, "standard_error": 0.0123, "note": HOSTILE},
                    {"name": "clips", "value": 192, "standard_error": None, "note": ""}],
        "examples": [{"key": "a", "title": HOSTILE, "truth_video": "examples/own sound #1.mp4", "truth_mel": "examples/mel.npy",
                      "generated_video": "https://example.org/a.mp4", "generated_mel": "examples/none.npy"},
                     {"key": HOSTILE, "truth_video": "../../outside.mp4", "generated_video": f"examples/{HOSTILE}.mp4"}],
        "environment": {"versions": {"torch": "2.13.0", HOSTILE: HOSTILE}, "seconds": {"contrastive": 281.53}, "cores": [1, 2]},
    }
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    (run.parent / "outside.mp4").write_bytes(b"video")
    return run


@pytest.fixture(scope="module")
def page(run):
    return Page(write_report(run))


def test_every_part_is_there(page, run):
    headings = ["Results", "Examples", "Training", "Preference rounds", "Recipe", "Environment"]
    assert [text for text in page.text if text in headings] == headings
    for words in ("demo & more", "1 of 2 bars missed", "≥ 0.156", "≤ 0.35", "0.4123", "± 0.012", "192", "clip-a", "-0.125", "281.5", "1, 2",
                  "8 steps, about 4 s"):
        assert words in page.words
    assert page.tags.count("svg") == 3 * 3 + 3, "losses and rates of three stages, three signs; those of the sweep are not the run's"
    rounds = [text for text in page.text if text.startswith("preference/")]
    assert rounds == ["preference/round-2", "preference/round-10", "preference/round-2"]


def test_the_rounds_say_which_was_kept_and_what_got_worse(page):
    for words in ("round 1 is kept", BEST["reason"], "got worse", *BEST["warnings"], "1, kept", "0.34 ± 0.011 (+4.0 s.e.)",
                  "reward_since_start", "0.9375"):
        assert words in page.words, words
    assert page.words.count("distance of the latents from the truth") == 2, "once in the table, once over its curve"
    details = page.text[page.text.index("all signs: changes, drift, losses, margins, implicit accuracy"):]
    assert "drift" in details and "distance" not in details, "how far it is from the start is a warning and no measure: not charted"
    assert not any("kept" in text for text in page.text if text.startswith("2"))


def test_losers_and_winners_of_pairs_are_marked(page):
    start = page.text.index("clip-a")
    assert page.text[start:start + 10] == ["clip-a", "0.2500", "-0.1250", "–", "0.3750", "clip-b", "0.2500", "-0.1250", "–", "0.3750"]
    pills = [value for tag, name, value in page.attributes if tag == "span" and name == "class"][-4:]
    assert pills == ["pill good", "pill bad", "pill bad", "pill good"], "a candidate wins over another, the true sound over a candidate"


def test_links_stay_in_the_run_and_exist(page, run):
    links = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href", "action", "poster", "data")]
    files = [link for link in links if not link.startswith(("data:image/png;base64,", "#"))]
    assert [unquote(link) for link in files] == ["examples/own sound #1.mp4", "sweep/sweep.html"]
    assert all((run / unquote(link)).is_file() for link in files)
    assert "link" not in page.tags and "iframe" not in page.tags
    assert not any("url(" in (value or "") and "url(#" not in value for _, _, value in page.attributes)


def test_no_address_of_the_network_but_in_text(page):
    assert not [value for _, _, value in page.attributes if value and "://" in value]
    assert "no video: https://example.org/a.mp4 is not in the run folder" in page.words


def test_hostile_captions_are_text(page):
    assert page.tags.count("script") == 1
    assert page.words.count(HOSTILE) >= 6
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_ids_are_unique(page):
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert ids and len(ids) == len(set(ids))


def test_recipes_that_repeat_appear_once(page):
    assert page.tags.count("pre") == 1


def test_the_report_is_written_anew(run):
    before = write_report(run).read_text()
    assert write_report(run).read_text() == before
    assert not list(run.glob("*.partial"))


def test_an_empty_run_says_what_is_missing(tmp_path):
    page = Page(write_report(tmp_path))
    for words in ("has not been evaluated", "No examples", "no metrics.jsonl", "No preference round", "No recipe.yaml", "was not recorded"):
        assert words in page.words


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match="no run folder"):
        write_report(tmp_path / "none")
    np.save(tmp_path / "mel.npy", np.zeros(3))
    (tmp_path / "evaluation.json").write_text(json.dumps({"examples": [{"key": "a", "truth_mel": "mel.npy"}]}))
    with pytest.raises(ValueError, match=r"mel.npy holds no finite log-mel \(F, T\)"):
        write_report(tmp_path)
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(ValueError, match="evaluation.json is not JSON"):
        write_report(tmp_path)


def test_curves_of_a_killed_and_resumed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "lr": 0.1, "loss": 3.0}\n{"step": 2, "loss": 9.0}\n{"step": 3, "lo{"step": 2, "loss": 2.0}\n'
                    '{"step": 2, "loss": 2.5, "note": "text", "flag": true}\n{"step": 2, "validation/loss": NaN}\n{"loss": 1}\n')
    loss, rate = read_curves(path)
    assert (loss.name, loss.train, rate.name, rate.train) == ("loss", [(1, 3.0), (2, 2.5)], "lr", [(1, 0.1)])
    assert len(loss.validation) == 1 and np.isnan(loss.validation[0][1])

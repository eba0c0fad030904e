"""The preference section refuses what makes no sense, and says what to give instead."""

import pytest

from pipelines.config.preference import DistortionConfig, PreferenceConfig, WatchConfig
from pipelines.recipes import RecipeError, load_recipe


@pytest.mark.parametrize(("values", "message"), [
    ({"rounds": -1}, "rounds is -1: give 0 or more"),
    ({"videos": -1}, "videos is -1: give 0 for all, or how many"),
    ({"batch_videos": 0}, "batch_videos is 0: give 1 or more"),
    ({"candidates": 0}, "candidates is 0: give 1 or more where winner is truth"),
    ({"candidates": 1, "winner": "best_of_n"}, "candidates is 1: give 2 or more where winner is best_of_n"),
    ({"winner": "best_of_n", "losers": "distorted"}, "with losers=distorted nothing is generated that could win"),
    ({"losers": "mixed", "distorted_share": 1.0}, "distorted_share is 1: give a share between 0 and 1, or losers=candidates"),
])
def test_impossible_rounds(values, message):
    with pytest.raises(ValueError, match=message):
        PreferenceConfig(**values)


@pytest.mark.parametrize(("values", "message"), [
    ({"kinds": ()}, "kinds is empty: name at least one of shift, warp, swap"),
    ({"kinds": ("swap", "swap")}, "kinds names one twice: swap, swap"),
    ({"levels": 0}, "levels is 0: give 1 or more"),
    ({"subtle_seconds": 0.0}, "subtle_seconds is 0: give seconds above 0"),
    ({"subtle_seconds": 0.64}, "coarse_seconds 0.64 must be above subtle_seconds 0.64"),
])
def test_impossible_distortions(values, message):
    with pytest.raises(ValueError, match=message):
        DistortionConfig(**values)


@pytest.mark.parametrize(("values", "message"), [
    ({"clips": 1}, "clips is 1: give 2 or more, for a standard error"),
    ({"max_flow_rise": -0.1}, "max_flow_rise is -0.1: give 0 or more"),
    ({"max_onset_sigmas": -1.0}, "max_onset_sigmas is -1: give 0 or more"),
])
def test_impossible_watching(values, message):
    with pytest.raises(ValueError, match=message):
        WatchConfig(**values)


@pytest.mark.parametrize(("losers", "needs"), [("candidates", (True, False)), ("distorted", (False, True)), ("mixed", (True, True))])
def test_what_the_losers_need(losers, needs):
    config = PreferenceConfig(losers=losers)
    assert (config.needs_candidates, config.needs_distorted) == needs


def test_every_switch_of_the_paper_is_one_key():
    switches = ("reward=elsewhere", "objective=dpo", "tuning=full", "winner=best_of_n", "score=mean", "rounds=5", "losers=mixed")
    config = load_recipe("vggsound", [f"preference.{switch}" for switch in switches]).preference
    assert (config.reward, config.objective, config.tuning, config.winner) == ("elsewhere", "dpo", "full", "best_of_n")
    assert (config.score, config.rounds, config.losers) == ("mean", 5, "mixed")
    with pytest.raises(RecipeError, match="preference.tuning"):
        load_recipe("vggsound", ["preference.tuning=half"])


def test_the_papers_values_are_in_the_recipe():
    """Appendix C."""
    config = load_recipe("vggsound").preference
    train, optimiser = config.train, config.train.optimiser
    assert (config.rounds, config.candidates, config.score, config.winner, config.tuning) == (5, 5, "bottom_quartile", "truth", "top")
    assert (train.steps, train.accumulation, optimiser.lr, optimiser.weight_decay) == (1000, 2, 5e-6, 1e-4)
    assert (optimiser.warmup_steps, optimiser.schedule, optimiser.gradient_clipping) == (100, "cosine", 1.0)
    alone = PreferenceConfig().train
    assert alone.optimiser == optimiser, "a recipe without this section has them too"
    assert (alone.steps, alone.accumulation, alone.ema_decay) == (train.steps, train.accumulation, train.ema_decay) == (1000, 2, 0)
    assert PreferenceConfig().train is not alone


def test_what_is_minimised_by_default():
    """Both terms in one unit, so that neither beta nor the units of a loss say which of them is learned."""
    config = PreferenceConfig()
    assert (config.objective, config.normalise) == ("avp_rpo", "balanced")
    assert load_recipe("demo").preference.normalise == load_recipe("rendered").preference.normalise == "balanced"
    assert load_recipe("vggsound", ["preference.objective=flow_win"]).preference.objective == "flow_win"

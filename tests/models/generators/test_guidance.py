"""Guidance by one pass and from prepared conditions; compiled blocks."""

import copy
import dataclasses
import shutil

import pytest
import torch

from models.generators.mmdit import TopBlocks
from models.objectives.flow_matching import integrate
from tests.fixtures.made_weights import made_input
from tests.models.generators.test_mmdit import TINY, made_model, tiny_inputs


@pytest.fixture(scope="module")
def tiny():
    return made_model().requires_grad_(False)


def test_guidance_extrapolates_from_the_unconditional_flow(tiny):
    inputs, negative = tiny_inputs(), made_input("negative", (2, 1, 16))
    conditions = {name: inputs[name] for name in ("clip", "sync", "text")}
    conditional = tiny(**inputs)
    unconditional = tiny(inputs["latent"], None, None, None, inputs["t"])
    against = tiny(inputs["latent"], None, None, negative, inputs["t"])
    guided = {s: tiny.guided_flow(inputs["latent"], inputs["t"], **conditions, strength=s) for s in (0.5, 1.0, 3.0)}
    assert torch.equal(guided[0.5], conditional) and torch.equal(guided[1.0], conditional)
    torch.testing.assert_close(guided[3.0], 3 * conditional - 2 * unconditional)
    repelled = tiny.guided_flow(inputs["latent"], inputs["t"], **conditions, strength=3.0, negative_text=negative)
    torch.testing.assert_close(repelled, 3 * conditional - 2 * against)


def test_empties_of_guidance_are_as_long_as_the_conditions(tiny):
    inputs = tiny_inputs()
    inputs["clip"] = made_input("clip", (2, 10, 512))
    everyone = torch.ones(2, dtype=torch.bool)
    expected = 2 * tiny(**inputs) - tiny(**inputs, drop_video=everyone, drop_text=everyone)
    latent, t = inputs.pop("latent"), inputs.pop("t")
    torch.testing.assert_close(tiny.guided_flow(latent, t, **inputs, strength=2.0), expected)


@pytest.mark.parametrize("missing", [(), ("text",), ("clip", "sync"), ("clip", "sync", "text")])
def test_prepared_guidance_is_guided_flow_at_every_step(tiny, missing):
    inputs = tiny_inputs() | dict.fromkeys(missing)
    latent, t = inputs.pop("latent"), inputs.pop("t")
    guidance = tiny.guidance(latent.shape[:2], **inputs, strength=4.5)
    for _ in range(2):
        torch.testing.assert_close(guidance(latent, t), tiny.guided_flow(latent, t, **inputs, strength=4.5), rtol=1e-4, atol=1e-5)
        latent, t = latent + 0.3, t + 0.1


def test_guidance_prepares_the_conditions_once(tiny):
    model, calls = copy.deepcopy(tiny), []
    for name in ("clip_input_proj", "sync_input_proj", "text_input_proj", "global_cond_mlp", "audio_input_proj", "t_embed"):
        getattr(model, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    inputs = tiny_inputs()
    latent, _ = inputs.pop("latent"), inputs.pop("t")
    integrate(model.guidance(latent.shape[:2], **inputs, strength=2.0), latent, steps=5)
    counts = {name: calls.count(name) for name in calls}
    assert counts == {**dict.fromkeys(("clip_input_proj", "sync_input_proj", "text_input_proj", "global_cond_mlp"), 2),
                      **dict.fromkeys(("audio_input_proj", "t_embed"), 5)}


def test_missing_conditions_are_projected_as_one_row(tiny):
    model, rows = copy.deepcopy(tiny), []
    model.text_input_proj.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    model(**{**tiny_inputs(5), "text": None})
    model.guided_flow(**{**tiny_inputs(5), "text": None}, strength=2.0)
    assert rows == [1, 1, 1]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_answer_the_same_and_keep_their_names(backend):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor needs g++ on a CPU")
    # A block of each kind: inductor takes a while for each.
    model = made_model(dataclasses.replace(TINY, depth=2, fused_depth=1))
    plain = model(**tiny_inputs())
    plain.square().mean().backward()
    compiled = copy.deepcopy(model)
    compiled.compile_blocks(backend=backend)
    flow = compiled(**tiny_inputs())
    torch.testing.assert_close(flow, plain, rtol=1e-4, atol=1e-5)
    flow.square().mean().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in compiled.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)
    assert compiled.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(TopBlocks.copy_of(compiled).fused_block.linear1.weight, compiled.fused_blocks[-1].linear1.weight)

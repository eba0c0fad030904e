"""AVP-RPO's model: a shared trunk, a trained top, a reference that stays."""

import dataclasses

import torch

from models.generators.mmdit import PRESETS, MMDiT
from models.objectives.flow_dpo import flow_dpo_loss
from models.objectives.flow_matching import flow_loss, interpolate
from pipelines.stages.preference import PreferenceModel
from tests.pipelines.stages.test_generative import CONFIG


def made(seed=0):
    torch.manual_seed(seed)
    generator = MMDiT(CONFIG)
    for parameter in generator.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return generator


def batch():
    shapes = {"winner": (3, 12, 4), "loser": (3, 12, 4), "noise": (3, 12, 4), "clip": (3, 6, 8), "sync": (3, 32, 8)}
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} | {"t": torch.rand(3, generator=generator)}


def test_shared_trunk_equals_two_full_models():
    start, model = made(), PreferenceModel(made(), beta=3.0, normalise="none")
    with torch.no_grad():
        for parameter in model.generator.top_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    given, losses = batch(), []
    for generator in (model.generator, start):
        for side in ("winner", "loser"):
            x_t, target = interpolate(given["noise"], given[side], given["t"])
            losses.append(flow_loss(generator(x_t, given["clip"], given["sync"], None, given["t"]), target))
    expected = flow_dpo_loss(*losses, beta=3.0)
    found = model(**given)
    torch.testing.assert_close(found["dpo"], expected.loss)
    # Batches of six and of three are summed in another order.
    torch.testing.assert_close(found["margin"], expected.margin, rtol=1e-4, atol=0)
    torch.testing.assert_close(found["loss"], expected.loss + losses[0].mean())


def test_it_starts_at_its_reference():
    found = PreferenceModel(made(), beta=1000.0, normalise="running_max")(**batch())
    assert abs(found["margin"]) < 1e-7
    torch.testing.assert_close(found["dpo"], torch.tensor(2.0).log())
    torch.testing.assert_close(found["loss"], torch.tensor(2.0))


def test_only_the_top_trains():
    model = PreferenceModel(made(), beta=1.0, normalise="none")
    model(**batch())["loss"].backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[1] for name in trained} == {"fused_blocks", "final_layer"}
    with torch.device("meta"):
        published = PreferenceModel(MMDiT(dataclasses.replace(PRESETS["small_16k"])), beta=1.0, normalise="none")
    assert sum(parameter.numel() for parameter in published.parameters() if parameter.requires_grad) == 8_039_060

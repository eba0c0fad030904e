"""Both of MMAudio's releases against one plain restatement (facts of its public code): functions of the state dict, none of our modules.

The first release is held to the public model's outputs in test_mmdit.py; what agrees with it there carries the second one here.
"""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.nn.functional import silu

from models.generators.mmdit import PRESETS, MMDiT
from tests.fixtures.made_weights import made_input, made_state, relative_error

# More blocks than `tiny`, so that one is neither first nor last; a latent length that is no multiple of the others'.
CONFIG = dataclasses.replace(PRESETS["tiny"], depth=6, fused_depth=3, latent_len=125, text_len=5, sync_group=8, sync_len=88, sync_margin=1)


class Restated:
    """MMAudio's forward pass from the weights `w` alone."""

    def __init__(self, w, second: bool):
        self.w, self.second, self.heads = w, second, CONFIG.heads

    def map(self, x, name):
        """Linear, or a convolution over time where the weight has three dimensions."""
        weight, bias = self.w[f"{name}.weight"], self.w.get(f"{name}.bias")
        if weight.dim() == 2:
            return F.linear(x, weight, bias)
        return F.conv1d(x.transpose(1, 2), weight, bias, padding=weight.shape[2] // 2).transpose(1, 2)

    def swiglu(self, x, name):
        return self.map(silu(self.map(x, f"{name}.w1")) * self.map(x, f"{name}.w3"), f"{name}.w2")

    def project(self, x, name):
        """First release: SELU after the convolutions of audio and synchrony, nothing after the linear maps of frames and text, whose MLP
        is then second. Second release: SiLU after all four."""
        name, x = f"{name}_input_proj", self.map(x, f"{name}_input_proj.0")
        if self.second:
            return self.swiglu(silu(x), f"{name}.2")
        return self.swiglu(F.selu(x), f"{name}.2") if name.startswith(("audio", "sync")) else self.swiglu(x, f"{name}.1")

    def time(self, t):
        """First release: 256 values, t as it is. Second: as many as the model is wide, of 10,000 t."""
        count, scale = (CONFIG.hidden, 10_000.0) if self.second else (256, 1.0)
        angles = torch.stack([scale * t * math.exp(-math.log(10_000) * 2 * i / count) for i in range(count // 2)], dim=1)
        return self.map(silu(self.map(torch.cat((torch.cos(angles), torch.sin(angles)), dim=1), "t_embed.mlp.0")), "t_embed.mlp.2")

    def modulation(self, c, name):
        return self.map(silu(c), f"{name}.adaLN_modulation.1")

    def qkv(self, x, name, positions):
        """Channels are packed (head, channel, query | key | value); pairs of channels turn with their position."""
        x = self.map(x, f"{name}.qkv")
        x = x.reshape(*x.shape[:2], self.heads, -1, 3)
        q, k, v = (x[..., i].transpose(1, 2) for i in range(3))
        q, k = (F.rms_norm(y, y.shape[-1:], self.w[f"{name}.{norm}.weight"]) for y, norm in ((q, "q_norm"), (k, "k_norm")))
        if positions is not None:
            frequency = 10_000.0 ** -(torch.arange(0, q.shape[-1], 2) / q.shape[-1])
            turn = torch.polar(torch.ones(()), positions[:, None] * frequency)
            q, k = (torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2) for y in (q, k))
        return q, k, v

    @staticmethod
    def attend(q, k, v):
        return ((q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(1, 2).flatten(2)

    def blocks(self, names, streams, conditions, positions):
        """One attention over the streams that have a block each; a block without `linear1` gives its stream no update."""
        parts = [self.modulation(c, name) for c, name in zip(conditions, names, strict=True)]
        parts = [part.chunk(part.shape[-1] // CONFIG.hidden, dim=-1) for part in parts]
        seen = [F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift for x, (shift, scale, *_) in zip(streams, parts, strict=True)]
        heads = [self.qkv(x, f"{name}.attn", at) for x, name, at in zip(seen, names, positions, strict=True)]
        attended = self.attend(*(torch.cat(each, dim=2) for each in zip(*heads, strict=True)))
        ends = [0, *torch.tensor([x.shape[1] for x in streams]).cumsum(0).tolist()]
        found = []
        for x, name, part, (start, end) in zip(streams, names, parts, pairwise(ends), strict=True):
            if f"{name}.linear1.weight" in self.w:
                gate, shift, scale, mlp_gate = part[2:]
                x = x + self.map(attended[:, start:end], f"{name}.linear1") * gate
                x = x + self.swiglu(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift, f"{name}.ffn") * mlp_gate
            found.append(x)
        return found

    def __call__(self, latent, clip, sync, text, t):
        length = latent.shape[1]
        latent, clip, text = (self.project(x, name) for x, name in ((latent, "audio"), (clip, "clip"), (text, "text")))
        sync = self.project((sync.unflatten(1, (-1, CONFIG.sync_group)) + self.w["sync_pos_emb"]).flatten(1, 2), "sync")
        nearest = ((torch.arange(length) + 0.5) * sync.shape[1] / length).long()
        pooled = self.map(clip.mean(1), "clip_cond_proj") + self.map(text.mean(1), "text_cond_proj")
        shared = (self.time(t) + self.swiglu(pooled, "global_cond_mlp"))[:, None]
        aligned = shared + sync[:, nearest]
        at = torch.arange(float(length)), torch.arange(float(clip.shape[1])) * length / clip.shape[1]
        for i in range(CONFIG.depth - CONFIG.fused_depth):
            names = [f"joint_blocks.{i}.{kind}_block" for kind in ("latent", "clip", "text")]
            latent, clip, text = self.blocks(names, (latent, clip, text), (aligned, shared, shared), (*at, None))
        for i in range(CONFIG.fused_depth):
            (latent,) = self.blocks([f"fused_blocks.{i}"], [latent], [aligned], at[:1])
        shift, scale = self.modulation(shared, "final_layer").chunk(2, dim=-1)
        return self.map(F.layer_norm(latent, latent.shape[-1:]) * (1 + scale) + shift, "final_layer.conv")


def weights(second: bool):
    """Made weights: unlike fresh ones, none of their gates is closed."""
    with torch.device("meta"):
        model = MMDiT(dataclasses.replace(CONFIG, v2=second))
    return made_state({name: value.shape for name, value in model.state_dict().items()})


def inputs():
    clip, sync = CONFIG.condition_lengths(CONFIG.latent_len)
    shapes = {"latent": (3, CONFIG.latent_len, CONFIG.latent_dim), "clip": (3, clip, CONFIG.clip_dim), "sync": (3, sync, CONFIG.sync_dim),
              "text": (3, CONFIG.text_len, CONFIG.text_dim)}
    return {name: made_input(name, shape) for name, shape in shapes.items()} | {"t": torch.tensor([0.0, 0.375, 1.0])}


@pytest.mark.parametrize("second", [False, True])
def test_the_flow_is_the_restated_one(second):
    state = weights(second)
    model = MMDiT(dataclasses.replace(CONFIG, v2=second)).eval()
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        flow, wanted = model(**inputs()), Restated(state, second)(**inputs())
    assert wanted.std() > 0.1 and relative_error(flow, wanted) < 1e-4


@pytest.mark.parametrize("difference", ["project", "time"])
def test_each_difference_of_the_second_release_would_be_seen(difference, monkeypatch):
    state = weights(True)
    model = MMDiT(dataclasses.replace(CONFIG, v2=True)).eval()
    model.load_state_dict(state)
    time = Restated.time
    other = {"project": lambda self, x, name: self.swiglu(F.selu(self.map(x, f"{name}_input_proj.0")), f"{name}_input_proj.2"),
             "time": lambda self, t: time(self, t / 10_000)}
    monkeypatch.setattr(Restated, difference, other[difference])
    with torch.no_grad():
        assert relative_error(model(**inputs()), Restated(state, True)(**inputs())) > 1e-2


@pytest.mark.parametrize("second", [False, True])
def test_gradients_are_those_of_the_restated_one(second):
    """The second release can be trained too, though MMAudio's own code does not."""
    state = weights(second)
    model = MMDiT(dataclasses.replace(CONFIG, v2=second))
    model.load_state_dict(state)
    target = made_input("target", (3, CONFIG.latent_len, CONFIG.latent_dim))
    leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
    (model(**inputs()) - target).square().mean().backward()
    (Restated(leaves, second)(**inputs()) - target).square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and leaves[name].grad.abs().max() > 1e-7:
            assert relative_error(parameter.grad, leaves[name].grad) < 1e-3, name
    assert all(model.get_parameter(f"{name}_input_proj.0.weight").grad.abs().max() > 0 for name in ("audio", "clip", "sync", "text"))

"""A training step of MM-DiT small_16k: ours against the layout of the public code, on the same weights.

The reference restates the structure of MMAudio's network: heads unpacked to (B, H, N, d, 3), rotations as 2 x 2 matrices, convolutions
that go to channels first and back, missing text repeated for every sample before it is projected. Both run one after the other and take
turns.
"""

from __future__ import annotations

import argparse
import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import alternate, machine, show
from models.generators.mmdit import PRESETS, MMDiT
from models.layers import ChannelLastConv1d, TransformerBlock, modulate
from models.objectives.flow_matching import flow_loss, interpolate


class ChannelsFirstConv1d(ChannelLastConv1d):
    """The same convolution on the transposed sequence."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.Conv1d.forward(self, x.transpose(1, 2)).transpose(1, 2)


class Reference(nn.Module):
    """The public code's data flow over a copy of the weights of an MMDiT."""

    def __init__(self, model: MMDiT):
        super().__init__()
        self.model = copy.deepcopy(model)
        for module in self.modules():
            if isinstance(module, ChannelLastConv1d):
                module.__class__ = ChannelsFirstConv1d

    def forward(self, latent: Tensor, clip: Tensor, sync: Tensor, text: Tensor | None, t: Tensor) -> Tensor:
        """Flow (B, N, C)."""
        m = self.model
        if text is None:
            text = m.empty_string_feat.expand(len(latent), -1, -1)
        clip, text, sync = m.clip_input_proj(clip), m.text_input_proj(text), self._sync(sync, latent.shape[1])
        pooled = m.clip_cond_proj(clip.mean(dim=1)) + m.text_cond_proj(text.mean(dim=1))
        shared = m.global_cond_mlp(pooled).unsqueeze(1) + m.t_embed(t).unsqueeze(1)
        aligned, x = shared + sync, m.audio_input_proj(latent)
        rotation = rotation_matrices(x.shape[1], 1.0, x.device)
        clip_rotation = rotation_matrices(clip.shape[1], x.shape[1] / clip.shape[1], x.device)
        for block in m.joint_blocks:
            x, clip, text = joint(block, (x, clip, text), (aligned, shared, shared), (rotation, clip_rotation, None))
        for block in m.fused_blocks:
            heads, rest = before(block, x, aligned, rotation)
            x = after(block, x, attention(*heads), rest)
        return m.final_layer(x, shared)

    def _sync(self, sync: Tensor, length: int) -> Tensor:
        batch, tokens, width = sync.shape
        grouped = sync.view(batch, tokens // 8, 8, width) + self.model.sync_pos_emb
        projected = self.model.sync_input_proj(grouped.flatten(1, 2)).transpose(1, 2)
        return F.interpolate(projected, size=length, mode="nearest-exact").transpose(1, 2)


def rotation_matrices(length: int, stride: float, device: torch.device) -> Tensor:
    """(1, N, 32, 2, 2) for heads of 64."""
    frequencies = stride / 10_000 ** (torch.arange(0, 64, 2, device=device) / 64)
    angles = torch.outer(torch.arange(length, device=device), frequencies)
    return torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], dim=-1).view(1, length, 32, 2, 2)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Heads (B, H, N, d) turned by `rotation`."""
    pairs = x.float().reshape(*x.shape[:-1], -1, 1, 2)
    turned = rotation[..., 0] * pairs[..., 0] + rotation[..., 1] * pairs[..., 1]
    return turned.reshape(*x.shape).type_as(x)


def before(block: TransformerBlock, x: Tensor, condition: Tensor, rotation: Tensor | None):
    """Queries, keys and values, and the modulation that is left."""
    shift, scale, *rest = block.adaLN_modulation(condition).chunk(2 if block.attention_only else 6, dim=-1)
    attn = block.attn
    packed = attn.qkv(modulate(block.norm1(x), shift, scale))
    batch, tokens, _ = packed.shape
    q, k, v = packed.view(batch, tokens, attn.heads, -1, 3).permute(0, 2, 1, 3, 4).split(1, dim=-1)
    q, k, v = attn.q_norm(q.squeeze(-1)), attn.k_norm(k.squeeze(-1)), v.squeeze(-1)
    if rotation is not None:
        q, k = rotate(q, rotation), rotate(k, rotation)
    return (q, k, v), rest


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Tokens (B, N, D)."""
    out = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
    return out.permute(0, 2, 1, 3).reshape(out.shape[0], out.shape[2], -1).contiguous()


def after(block: TransformerBlock, x: Tensor, attended: Tensor, rest: list[Tensor]) -> Tensor:
    """Both residual updates; none in the last joint block's conditions."""
    if block.attention_only:
        return x
    gate, shift, scale, mlp_gate = rest
    x = x + block.linear1(attended) * gate
    return x + block.ffn(modulate(block.norm2(x), shift, scale)) * mlp_gate


def joint(block: nn.Module, streams, conditions, rotations) -> list[Tensor]:
    """The three streams after one joint block."""
    blocks = (block.latent_block, block.clip_block, block.text_block)
    heads, rests = zip(*(before(*each) for each in zip(blocks, streams, conditions, rotations, strict=True)), strict=True)
    q, k, v = (torch.cat([h[i] for h in heads], dim=2) for i in range(3))
    attended = attention(q, k, v).split([x.shape[1] for x in streams], dim=1)
    return [after(*each) for each in zip(blocks, streams, attended, rests, strict=True)]


def made_model(preset: str = "small_16k") -> MMDiT:
    """A generator none of whose gates is closed."""
    torch.manual_seed(0)
    model = MMDiT(PRESETS[preset])
    for name, parameter in model.named_parameters():
        if "adaLN" in name or name.startswith("final_layer.conv"):
            nn.init.normal_(parameter, std=0.02)
    return model


def made_inputs(batch: int) -> dict[str, Tensor]:
    """Noise, conditions and times of 8 s clips."""
    shapes = {"latent": (250, 20), "clip": (64, 1024), "sync": (192, 768), "text": (77, 1024)}
    return {name: torch.randn(batch, *shape) for name, shape in shapes.items()} | {"t": torch.rand(batch)}


def main() -> None:
    """Print seconds per step and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model, rows = made_model(), []
    reference = Reference(model)
    with torch.no_grad():
        given = made_inputs(1)
        difference = (model(**given) - reference(**given)).abs().max() / model(**given).abs().max()
    for batch in options.batches:
        for what in ("with text", "without text"):
            step = training_step(made_inputs(batch), what == "with text")
            seconds = alternate({"reference": partial(step, reference), "ours": partial(step, model)}, options.repeats)
            rows.append([batch, what, seconds["reference"], seconds["ours"], seconds["reference"] / seconds["ours"]])
    print(f"{machine('torch')}, {torch.get_num_threads()} threads; largest relative difference of the flows {difference:.1e}")
    show("Training step of small_16k", ["batch", "captions", "reference, s", "ours, s", "ratio"], rows)


def training_step(given: dict[str, Tensor], text: bool):
    """Forward and backward pass of the flow loss through a model."""
    noise = torch.randn_like(given["latent"])
    x_t, target = interpolate(noise, given["latent"], given["t"])
    conditions = (given["clip"], given["sync"], given["text"] if text else None)

    def step(model: nn.Module) -> None:
        model.zero_grad(set_to_none=True)
        flow_loss(model(x_t, *conditions, given["t"]), target).mean().backward()

    return step


if __name__ == "__main__":
    main()

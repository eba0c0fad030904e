"""Encoders as conditioners, alone and combined."""

import dataclasses

import pytest
import torch
from torch import nn

from models.conditioning import (
    CLIPImageConditioner,
    CLIPTextConditioner,
    CombinedConditioner,
    EncoderConditioner,
    FrameView,
    SynchformerConditioner,
    ends_within_segment,
)
from models.encoders import synchformer
from models.encoders.features import VideoFeatures
from models.encoders.sf_cavp import PRESETS, SFCAVP
from models.encoders.synchformer import Synchformer
from models.generators import mmdit
from models.generators.mmdit import MMDiT

SIZES = ("clip_dim", "clip_len", "sync_dim", "sync_len", "sync_group", "sync_margin", "text_dim", "text_len")


class LinearCLIP(nn.Module):
    """The smallest encoder of pictures and captions, of CLIP's sizes."""

    image_dim, text_dim, text_len = 1024, 1024, 77

    def encode_image(self, frames):
        """Mean colour in the first three channels."""
        return nn.functional.pad(frames.mean(dim=(3, 4)), (0, 1021))

    def encode_text(self, text):
        """Length of the caption everywhere."""
        return torch.stack([torch.full((77, 1024), float(len(line))) for line in text])


def fields(config):
    return {name: getattr(config, name) for name in SIZES}


def on_meta(preset):
    with torch.device("meta"):
        return Synchformer(synchformer.PRESETS[preset])


@pytest.fixture(scope="module")
def conditioner():
    torch.manual_seed(0)
    return EncoderConditioner(SFCAVP(PRESETS["tiny"]).eval())


def test_tokens_follow_the_segments(conditioner):
    config = conditioner.encoder.config
    conditions, segments = conditioner(torch.rand(2, 70, 3, 32, 32))
    assert segments.shape == (2, 2, config.video.out_dim)
    assert conditions.clip.shape == (2, 2 * 32 // config.video.alpha, conditioner.encoder.semantic_dim)
    assert conditions.sync.shape == (2, 64, conditioner.encoder.sync_dim)
    assert conditions.text is None


def test_fit_standardises_each_channel_that_moves(conditioner):
    batches = [torch.rand(4, 32, 3, 32, 32) * torch.rand(4, 1, 1, 1, 1) for _ in range(3)]
    conditioner.fit(batches)
    tokens = torch.cat([conditioner(frames)[0].sync for frames in batches]).flatten(0, 1)
    floor = 0.1 * conditioner.sync_std.square().mean().sqrt()
    moving = conditioner.sync_std > 1.5 * floor
    assert moving.sum() > 10
    torch.testing.assert_close(tokens.mean(0), torch.zeros_like(tokens[0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(tokens.std(0)[moving], torch.ones(int(moving.sum())), atol=1e-3, rtol=0)
    assert tokens.std(0).max() < 1.001


def test_both_entrances_of_a_contrastive_encoder_say_the_same(conditioner):
    frames = torch.rand(1, 32, 3, 32, 32)
    assert conditioner.views == (FrameView(fps=25.0),)
    by_view = conditioner.conditions({conditioner.views[0]: frames}, ["a dog"])
    direct, _ = conditioner(frames)
    assert torch.equal(by_view.clip, direct.clip) and torch.equal(by_view.sync, direct.sync) and by_view.text is None


@pytest.mark.parametrize(("hop", "seconds"), [(32, 3.84), (32, 4.5), (16, 3.84)])
def test_sizes_are_those_of_the_tokens(hop, seconds):
    encoder = SFCAVP(dataclasses.replace(PRESETS["tiny"], hop_frames=hop)).eval()
    conditioner = EncoderConditioner(encoder)
    conditions, _ = conditioner(torch.rand(1, int(25 * seconds + 0.01), 3, 32, 32))
    sizes = conditioner.sizes(seconds)
    assert conditions.clip.shape == (1, sizes["clip_len"], sizes["clip_dim"])
    assert conditions.sync.shape == (1, sizes["sync_len"], sizes["sync_dim"])
    assert (sizes["sync_group"], sizes["sync_margin"]) == (32, 32 // hop - 1)


def markers(encoder):
    """An encoder whose tokens say how bright their frames are: one frame, or `alpha` of them."""

    def encode_video(frames):
        config = encoder.config
        bright = frames.mean(dim=(2, 3, 4)).unfold(1, config.segment_frames, config.hop_frames)
        slow = bright.unflatten(2, (-1, config.video.alpha)).mean(dim=3)
        widths = ((slow, encoder.semantic_dim), (bright, encoder.sync_dim))
        return VideoFeatures(bright, *(x.flatten(1)[..., None].expand(-1, -1, width) for x, width in widths))

    encoder.encode_video = encode_video
    return EncoderConditioner(encoder)


@pytest.mark.parametrize("seconds", [10.0, 8.0, 4.5, 3.0, 2.52])
def test_what_happens_late_in_a_clip_is_told_late(seconds):
    """An event in any picture, also after the last whole segment, reaches the latent of its time within a token's width."""
    conditioner, count, latents = markers(SFCAVP(PRESETS["tiny"])), int(25 * seconds), round(seconds / 0.032)
    frames = torch.eye(count)[:, :, None, None, None].expand(count, count, 3, 1, 1)  # clip i is bright in picture i alone
    conditions, segments = conditioner(frames)
    sizes, events = conditioner.sizes(seconds), (torch.arange(count) + 0.5) / 25
    assert (conditions.clip.shape[1], conditions.sync.shape[1]) == (sizes["clip_len"], sizes["sync_len"])
    assert segments.shape[1] == sizes["sync_len"] // 32, "as many as of the sound"
    # As MM-DiT lays tokens over the latents.
    heard = torch.nn.functional.interpolate(conditions.sync[..., 0][:, None], size=latents, mode="nearest-exact")[:, 0]
    width = seconds / sizes["sync_len"]
    middle = (heard * (torch.arange(latents) + 0.5)).sum(1) / heard.sum(1) * seconds / latents
    assert (middle - events).abs().max() <= width and heard.amax(dim=1).min() > 0.1, "and none is lost"
    slow, width = conditions.clip[..., 0], seconds / sizes["clip_len"]
    middle = (slow * (torch.arange(sizes["clip_len"]) + 0.5)).sum(1) / slow.sum(1) * width
    assert (middle - events).abs().max() <= width


def test_an_event_in_the_tenth_second_of_ten(conditioner):
    """Seen by the encoder itself: a picture that changes at 9.5 s is told from one that never does, there and not before."""
    still = torch.full((1, 250, 3, 32, 32), 0.5)
    moving = still.clone()
    moving[:, 237:] = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    changed = (conditioner(moving)[0].sync - conditioner(still)[0].sync).abs().sum(dim=2)[0]
    assert changed.shape == (224,)
    seconds = (torch.arange(224) + 0.5) * 10 / 224
    assert changed[seconds < 8.9].max() < 1e-3 * changed.max(), "its segment begins at 8.96 s"
    assert abs(seconds[changed.argmax()] - 9.5) < 0.3


@pytest.mark.parametrize(("hop", "frames"), [(32, 32), (32, 96), (32, 128), (16, 96), (16, 112)])
def test_clips_of_whole_segments_are_told_bit_by_bit_as_the_encoder_tells_them(hop, frames):
    conditioner = EncoderConditioner(SFCAVP(dataclasses.replace(PRESETS["tiny"], hop_frames=hop)).eval())
    conditioner.fit([torch.rand(4, 32, 3, 32, 32)])
    pictures = torch.rand(2, frames, 3, 32, 32)
    features, (conditions, segments) = conditioner.encoder.encode_video(pictures), conditioner(pictures)
    assert torch.equal(conditions.clip, (features.semantic - conditioner.clip_mean) / conditioner.clip_std)
    assert torch.equal(conditions.sync, (features.sync - conditioner.sync_mean) / conditioner.sync_std)
    assert torch.equal(segments, features.segments) and not ends_within_segment(frames / 25, conditioner.encoder.config)


@pytest.mark.parametrize(("hop", "frames"), [(32, 70), (16, 70)])
def test_a_rest_changes_no_segment_that_the_reward_compares(hop, frames):
    conditioner = EncoderConditioner(SFCAVP(dataclasses.replace(PRESETS["tiny"], hop_frames=hop)).eval())
    pictures = torch.rand(1, frames, 3, 32, 32)
    _, segments = conditioner(pictures)
    torch.testing.assert_close(segments, conditioner.encoder.encode_video(pictures).segments)
    assert ends_within_segment(frames / 25, conditioner.encoder.config)


def test_a_clip_shorter_than_a_segment_is_refused(conditioner):
    with pytest.raises(ValueError, match="a clip of 20 frames is shorter than one segment of 32: use longer clips"):
        conditioner(torch.rand(1, 20, 3, 32, 32))


def test_the_tiny_generator_fits_the_tiny_encoder(conditioner):
    sizes = conditioner.sizes(3.84)
    assert sizes == {name: fields(mmdit.PRESETS["tiny"])[name] for name in sizes}


def test_clip_and_synchformer_decide_the_sizes_of_mmaudio():
    clip = LinearCLIP()
    combined = CombinedConditioner(
        clip=CLIPImageConditioner(clip), sync=SynchformerConditioner(on_meta("divided_224_16x4")), text=CLIPTextConditioner(clip)
    )
    assert combined.fills == ("clip", "sync", "text")
    assert combined.views == (FrameView(fps=8.0, size=384, crop=False), FrameView(fps=25.0, size=224))
    assert combined.sizes(8.0) == fields(mmdit.PRESETS["small_16k"])
    lengths = {seconds: (combined.sizes(seconds)["clip_len"], combined.sizes(seconds)["sync_len"]) for seconds in (4.0, 5.04, 10.0)}
    assert lengths == {4.0: (32, 88), 5.04: (40, 112), 10.0: (80, 240)}
    config = mmdit.PRESETS["small_16k"]
    assert all(config.condition_lengths(latents) == lengths[s] for s, latents in ((4.0, 125), (10.0, 313)))


def test_a_generator_runs_on_combined_conditions():
    clip, sync = LinearCLIP(), SynchformerConditioner(Synchformer(synchformer.PRESETS["tiny"]).eval())
    images = CLIPImageConditioner(clip, size=16)
    combined = CombinedConditioner(clip=images, sync=sync, text=CLIPTextConditioner(clip))
    frames = {images.views[0]: torch.rand(2, 16, 3, 16, 16), sync.views[0]: torch.rand(2, 50, 3, 32, 32)}
    conditions = combined.conditions(frames, ["rain", "a dog barks"])
    assert conditions.clip.shape == (2, 16, 1024) and conditions.sync.shape == (2, 40, 32) and conditions.text.shape == (2, 77, 1024)
    assert conditions.text[1, 0, 0] == 11 and torch.equal(conditions.sync, sync.encoder.encode_video(frames[sync.views[0]]))
    generator = MMDiT(dataclasses.replace(mmdit.PRESETS["tiny"], **combined.sizes(2.0), latent_len=62))
    latent = torch.randn(2, 62, generator.config.latent_dim)
    flow = generator(latent, conditions.clip, conditions.sync, conditions.text, torch.tensor([0.2, 0.7]))
    assert flow.shape == latent.shape


def test_slots_may_be_mixed_with_our_own_encoder(conditioner):
    sync = SynchformerConditioner(Synchformer(synchformer.PRESETS["tiny"]).eval())
    combined = CombinedConditioner(clip=conditioner, sync=sync)
    assert combined.fills == ("clip", "sync") and combined.sizes(3.84)["clip_dim"] == 512 and combined.sizes(3.84)["sync_dim"] == 32
    frames = torch.rand(1, 96, 3, 32, 32)
    conditions = combined.conditions(dict.fromkeys(combined.views, frames))
    assert torch.equal(conditions.clip, conditioner(frames)[0].clip) and conditions.sync.shape == (1, 88, 32)


def test_a_conditioner_of_two_slots_runs_once(conditioner):
    combined, runs = CombinedConditioner(clip=conditioner, sync=conditioner), []
    counting = conditioner.register_forward_hook(lambda *_: runs.append(1))
    conditions = combined.conditions({combined.views[0]: torch.rand(1, 32, 3, 32, 32)})
    counting.remove()
    assert len(runs) == len(combined.views) == 1 and conditions.clip.shape[1] == 8 and conditions.sync.shape[1] == 32


def test_without_pictures_or_words_their_conditions_are_missing(conditioner):
    clip = LinearCLIP()
    combined = CombinedConditioner(clip=CLIPImageConditioner(clip), sync=conditioner, text=CLIPTextConditioner(clip))
    told = combined.conditions({}, ["rain"])
    assert told.clip is None and told.sync is None and told.text.shape == (1, 77, 1024)
    assert combined.conditions({}).text is None


def test_what_cannot_be_conditioned_on_is_explained(conditioner):
    sync = SynchformerConditioner(on_meta("tiny"))
    with pytest.raises(ValueError, match="SynchformerConditioner fills sync, not clip: give another one"):
        CombinedConditioner(clip=sync)
    with pytest.raises(ValueError, match=r"SynchformerConditioner needs frames as FrameView\(fps=25.0, size=32, crop=True\)"):
        sync.conditions({conditioner.views[0]: torch.rand(1, 32, 3, 32, 32)})
    with pytest.raises(ValueError, match="a clip of 0.6 s has 15 frames at 25 fps, fewer than one segment of 16: use longer clips"):
        sync.sizes(0.6)

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from data_prep.audio import MEL_SPECS
from models.encoders.batch_norm import BatchNorm
from models.encoders.sf_cavp import PRESETS, SFCAVP, SFCAVPConfig

TINY = PRESETS["tiny"]


def clip(batch: int, segments: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    frames = torch.rand(batch, 32 * segments, 3, 32, 32, generator=random)
    return frames, -5 + 2 * torch.randn(batch, 128, 128 * segments, generator=random)


def trained_statistics(model: SFCAVP) -> SFCAVP:
    """One pass in training mode, so that batch norms differ from the identity; then evaluation mode."""
    model.train()(*clip(4, 1, seed=1))
    return model.eval()


def test_shapes_of_all_features():
    model = SFCAVP(TINY).eval()
    frames, mel = clip(2, 3)
    video, audio = model.encode_video(frames), model.encode_audio(mel)
    assert video.segments.shape == audio.segments.shape == (2, 3, 640)
    assert video.semantic.shape == (2, 3 * 8, model.semantic_dim) and model.semantic_dim == 512
    assert video.sync.shape == audio.frames.shape == (2, 3 * 32, model.sync_dim) and model.sync_dim == 128


def test_a_clip_is_encoded_as_its_segments_are():
    model = trained_statistics(SFCAVP(TINY))
    frames, mel = clip(2, 3)
    whole, sound = model.encode_video(frames), model.encode_audio(mel)
    for s in range(3):
        part = model.encode_video(frames[:, 32 * s : 32 * (s + 1)])
        torch.testing.assert_close(whole.segments[:, s], part.segments[:, 0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(whole.semantic[:, 8 * s : 8 * (s + 1)], part.semantic, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(whole.sync[:, 32 * s : 32 * (s + 1)], part.sync, rtol=1e-4, atol=1e-4)
        heard = model.encode_audio(mel[:, :, 128 * s : 128 * (s + 1)])
        torch.testing.assert_close(sound.segments[:, s], heard.segments[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("frames", "hop", "segments"), [(200, 32, 6), (200, 16, 11), (250, 32, 7), (250, 16, 14), (33, 32, 1)])
def test_number_of_segments(frames, hop, segments):
    """8 s and 10 s with and without overlap give the S that AVP-RPO ranks."""
    model = SFCAVP(replace(TINY, hop_frames=hop)).eval()
    with torch.no_grad():
        assert model.encode_video(torch.rand(1, frames, 3, 16, 16)).segments.shape[1] == segments
        assert model.encode_audio(torch.randn(1, 128, 4 * frames)).segments.shape[1] == segments


def test_loss_starts_near_chance_and_falls_on_a_few_clips():
    torch.manual_seed(0)
    model = SFCAVP(TINY)
    frames, mel = clip(4, 1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        out = model(frames, mel)
        optimiser.zero_grad()
        out["loss"].backward()
        optimiser.step()
        losses.append(out["loss"].item())
    assert abs(losses[0] - math.log(4)) < 2
    assert losses[-1] < 0.2 and out["accuracy"] == 1
    assert out.keys() == {"loss", "accuracy", "temperature"} and not out["temperature"].requires_grad


def test_temperature_starts_as_configured_stays_within_bounds_and_always_has_a_gradient():
    model = SFCAVP(replace(TINY, temperature=0.07, temperature_bounds=(0.01, 0.5)))
    assert model.temperature.item() == pytest.approx(0.07, rel=1e-5)
    for logit in (-8.0, 8.0):
        torch.nn.init.constant_(model.temperature_logit, logit)
        model.temperature_logit.grad = None
        model.temperature.backward()
        assert 0.01 <= model.temperature.item() <= 0.5 and model.temperature_logit.grad > 0


def test_similarity_is_the_cosine_of_each_segment():
    model = SFCAVP(TINY)
    video, audio = torch.randn(2, 2, 3, 640)
    expected = (F.normalize(video, dim=-1) * F.normalize(audio, dim=-1)).sum(-1)
    torch.testing.assert_close(model.similarity(video, audio), expected)
    with pytest.raises(ValueError, match="cut both to one length"):
        model.similarity(video, audio[:, :2])


def frozen(model: SFCAVP) -> SFCAVP:
    """The model with all its norms' statistics frozen at what one batch gave."""
    model.train()(*clip(4, 1, seed=1))
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.policy = "frozen"
    return model


def gradients(model: SFCAVP, chunk: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    model.zero_grad()
    frames, mel = clip(3, 1)
    out = model(frames.double(), mel.double(), chunk=chunk)
    out["loss"].backward()
    return {name: value.detach() for name, value in out.items()}, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("chunk", "parts"), [(1, ("stem", "res3")), (2, ()), (3, ())])
def test_cached_gradients_by_chunks_are_those_of_the_whole_batch(chunk, parts):
    torch.manual_seed(0)
    towers = {name: replace(getattr(TINY, name), activation_checkpointing=parts, zero_init=False) for name in ("video", "audio")}
    model = frozen(SFCAVP(replace(TINY, **towers)).double())
    for found, wanted in zip(gradients(model, chunk), gradients(model, 0), strict=True):
        torch.testing.assert_close(found, wanted)


def test_chunks_leave_each_batch_norm_one_look_at_each_chunk():
    models = [SFCAVP(TINY), SFCAVP(TINY)]
    models[1].load_state_dict(models[0].state_dict())
    frames, mel = clip(4, 1)
    models[0].train()(frames, mel, chunk=2)["loss"].backward()
    for rows in (slice(0, 2), slice(2, 4)):
        models[1].train().encode_video(frames[rows])
    stem = [model.video.fast_stem[0].norm for model in models]
    assert stem[0].running_mean.abs().sum() > 0
    torch.testing.assert_close(stem[0].running_mean, stem[1].running_mean)
    torch.testing.assert_close(stem[0].running_var, stem[1].running_var)


def test_feature_norm_measures_the_whole_batch_in_spite_of_chunks():
    torch.manual_seed(0)
    towers = {name: replace(getattr(TINY, name), batch_norm="frozen") for name in ("video", "audio")}
    found, wanted = (SFCAVP(replace(TINY, **towers)).train() for _ in range(2))
    wanted.load_state_dict(found.state_dict())
    frames, mel = clip(4, 1)
    torch.testing.assert_close(found(frames, mel, chunk=1), wanted(frames, mel))
    torch.testing.assert_close(found.audio_norm.running_var, wanted.audio_norm.running_var)


def test_frames_may_be_the_bytes_that_were_decoded():
    model = SFCAVP(TINY).eval()
    frames = torch.randint(0, 256, (1, 32, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(model.encode_video(frames).segments, model.encode_video(frames / 255).segments)


@pytest.mark.parametrize("hop", [16, 32])
def test_length_of_segments_in_seconds(hop):
    config = replace(TINY, hop_frames=hop)
    seconds = config.seconds(6)
    assert seconds == {16: 4.48, 32: 7.68}[hop]
    with torch.no_grad():
        assert SFCAVP(config).eval().encode_video(torch.rand(1, round(seconds * 25), 3, 16, 16)).segments.shape[1] == 6


def test_published_size_is_the_papers():
    """32 frames at 25 fps and 128 log-mels of 10 ms with 128 bands, 1.28 s each; embeddings of 2304 = 2048 + 256 from both towers."""
    config, mel = PRESETS["r50"], MEL_SPECS[PRESETS["r50"].mel]
    assert (config.segment_frames, config.fps, config.segment_mels, config.hop_mels) == (32, 25.0, 128, 128)
    assert (mel.hop / mel.sample_rate, mel.bands) == (0.01, 128)
    assert config.segment_mels * mel.hop / mel.sample_rate == config.segment_frames / config.fps == config.seconds(1) == 1.28
    assert (config.video.alpha, config.video.beta, config.video.depths) == (config.audio.alpha, config.audio.beta, config.audio.depths)
    assert (config.video.alpha, config.video.beta, config.video.depths) == (4, 8, (3, 4, 6, 3))
    assert config.video.out_dim == config.audio.out_dim == 2304
    with torch.no_grad():
        model = SFCAVP(config).eval()
        segments = model.encode_video(torch.rand(1, 32, 3, 64, 64)).segments, model.encode_audio(torch.randn(1, 128, 128)).segments
    assert [tuple(x.shape) for x in segments] == [(1, 1, 2304)] * 2


def test_temporal_mean_hides_a_still_background():
    model = SFCAVP(replace(TINY, subtract_temporal_mean=True)).eval()
    frames, _ = clip(1, 1)
    background = torch.rand(1, 1, 3, 32, 32)
    torch.testing.assert_close(model.encode_video(frames).segments, model.encode_video(frames + background).segments, rtol=1e-3, atol=1e-3)


def test_feature_norm_standardises_the_embeddings():
    model = SFCAVP(TINY).train()
    segments = model.encode_audio(clip(8, 1)[1]).segments.flatten(0, 1)
    assert segments.mean(dim=0).abs().max() < 1e-4
    assert isinstance(SFCAVP(replace(TINY, feature_norm="none")).audio_norm, torch.nn.Identity)


@pytest.mark.parametrize("chunk", [0, 2])
def test_parameters_in_bfloat16_beside_float32_statistics_train(chunk):
    """That is how DeepSpeed holds a module."""
    model = SFCAVP(TINY)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().reshape(parameter.shape or 1)
    out = model(*clip(4, 1), chunk=chunk)
    out["loss"].backward()
    assert out["loss"].dtype == torch.float32 and out["loss"].isfinite() and out["temperature"].shape == ()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.video.slow_stem[0].norm.running_var.dtype == torch.float32


def test_clips_that_do_not_fit_are_refused():
    model = SFCAVP(TINY)
    frames, mel = clip(2, 2)
    with pytest.raises(ValueError, match="31 frames is shorter than one segment of 32"):
        model.encode_video(frames[:, :31])
    with pytest.raises(ValueError, match="127 mel frames is shorter"):
        model.encode_audio(mel[:, :, :127])
    with pytest.raises(ValueError, match=r"video gives segments \(2, 2, 640\), audio \(2, 1, 640\)"):
        model(frames, mel[:, :, :128])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hop_frames": 0}, "hop_frames is 0: choose 1 to segment_frames"),
        ({"segment_mels": 100, "hop_frames": 5}, "whole number of mels per hop"),
        ({"temperature": 2.0}, "temperature is 2.0: choose a value between"),
        ({"video_mean": (0.5,)}, "give 3 values"),
        ({"mel_std": 0.0}, "give values above 0"),
        ({"negatives": "all"}, "negatives is 'all': choose one of global, local"),
        ({"feature_norm": "layer"}, "feature_norm is 'layer'"),
        ({"video": TINY.video}, "towers give 640 and 2304 channels"),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SFCAVPConfig(**changes)

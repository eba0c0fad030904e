from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from models.conditioning import CLIPImageConditioner, CLIPTextConditioner
from models.encoders.clip import CLIP, CLIPConfig, _open_clip, load_clip
from tests.fixtures.made_weights import made_state, relative_error

if importlib.util.find_spec("open_clip") is None:
    pytest.skip("needs the extra clip", allow_module_level=True)

CAPTIONS = ["a dog barks", "Rain on a tin roof; thunder far away", ""]
TINY = CLIPConfig(architecture="tiny-vit-quickgelu", picture_size=32)
"""Of 32 pixels the patches of 14 cover 28, as they cover 378 of 384."""


@pytest.fixture(scope="module")
def open_clip(tmp_path_factory):
    """The package, which now knows the same two transformers, tiny but for the vocabulary."""
    package = _open_clip()
    sizes = package.get_model_config("ViT-H-14-378-quickgelu")
    sizes["embed_dim"] = 24
    sizes["vision_cfg"] |= {"image_size": 28, "layers": 2, "width": 32, "head_width": 16}
    sizes["text_cfg"] |= {"width": 32, "heads": 2, "layers": 2}
    path = tmp_path_factory.mktemp("models") / f"{TINY.architecture}.json"
    path.write_text(json.dumps(sizes))
    package.add_model_config(path)
    return package


@pytest.fixture(scope="module")
def theirs(open_clip):
    """open_clip's own model with made weights."""
    model = open_clip.model.CLIP(**open_clip.get_model_config(TINY.architecture))
    model.load_state_dict(made_state({name: value.shape for name, value in model.state_dict().items()}, unit_vectors=True))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory) -> CLIP:
    path = tmp_path_factory.mktemp("weights") / "open_clip_pytorch_model.bin"
    torch.save(theirs.state_dict(), path)
    return load_clip(path, TINY)


def test_public_model_has_the_published_size_and_answers_in_1024_channels():
    with torch.device("meta"):
        clip = CLIP()
        image = clip.encode_image(torch.rand(1, 2, 3, 384, 384))
    assert sum(p.numel() for p in clip.parameters()) == 986_714_881
    assert image.shape == (1, 2, clip.image_dim) == (1, 2, 1024)
    assert (clip.text_len, clip.text_dim) == (77, 1024)
    assert clip.model.attn_mask.device.type == "cpu"


def test_pictures_are_embedded_as_open_clip_does(open_clip, ours, theirs):
    frames = torch.rand(2, 3, 3, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    expected = F.normalize(theirs.encode_image(((frames - mean) / std).flatten(0, 1)), dim=-1)
    embeddings = ours.encode_image(frames)
    assert embeddings.shape == (2, 3, 24)
    assert relative_error(embeddings.flatten(0, 1), expected) < 1e-5
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(2, 3))


def test_captions_give_the_hidden_states_that_open_clip_projects(open_clip, ours, theirs):
    hidden = []
    hook = theirs.ln_final.register_forward_hook(lambda _, __, out: hidden.append(out))
    theirs.encode_text(open_clip.get_tokenizer("ViT-H-14-378-quickgelu")(CAPTIONS))
    hook.remove()
    tokens = ours.encode_text(CAPTIONS)
    assert tokens.shape == (3, 77, 32)
    assert relative_error(tokens, F.normalize(hidden[0], dim=-1)) < 1e-5
    torch.testing.assert_close(tokens.norm(dim=-1), torch.ones(3, 77))


def test_words_have_their_published_numbers(ours):
    tokens = ours.tokenizer(["a photo of a dog"])
    assert tokens.shape == (1, 77)
    assert tokens[0, :8].tolist() == [49406, 320, 1125, 539, 320, 1929, 49407, 0] and not tokens[0, 8:].any()


def test_a_token_depends_on_the_words_before_it_only(ours):
    one, other = ours.encode_text(["a dog barks", "a dog sleeps"])
    torch.testing.assert_close(one[:3], other[:3])
    assert (one[3] - other[3]).abs().max() > 1e-3


def test_a_long_caption_is_cut_and_still_ends(ours):
    tokens = ours.tokenizer(["rain " * 200])
    assert tokens.shape == (1, 77) and tokens[0, -1] == 49407
    assert ours.encode_text(["rain " * 200]).shape == (1, 77, 32)


def test_pictures_of_any_size_are_squashed_like_mmaudios(ours):
    """MMAudio resizes 8-bit pictures: rounding apart, the same pixels arrive."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    pictures = (torch.rand(4, 3, 90, 160, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    wanted = resize(pictures, [32, 32], InterpolationMode.BICUBIC, antialias=True).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (TINY.mean, TINY.std))
    pixels = ours._pixels(pictures.float() / 255) * std + mean
    assert pixels.shape == (4, 3, 32, 32)
    assert (pixels - wanted).abs().max() < 1.01 / 255


def test_pixels_behind_the_last_patch_go_unseen(ours):
    frames = torch.rand(1, 1, 3, 32, 32)
    changed = frames.clone()
    changed[..., 28:, :] = 0
    assert torch.equal(ours.encode_image(changed), ours.encode_image(frames))
    changed[..., 27, :] = 0
    assert not torch.allclose(ours.encode_image(changed), ours.encode_image(frames))


def test_encoding_in_pieces_changes_nothing(ours, theirs):
    frames = torch.rand(2, 5, 3, 32, 32)
    pieces = CLIP(CLIPConfig(architecture=TINY.architecture, picture_size=32, frames_at_once=3)).eval()
    pieces.model.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(pieces.encode_image(frames), ours.encode_image(frames))


def test_half_precision_weights_work(theirs, tmp_path):
    torch.save({name: value.bfloat16() for name, value in theirs.state_dict().items()}, tmp_path / "half.pt")
    half = load_clip(tmp_path / "half.pt", TINY)
    assert half.encode_image(torch.rand(1, 2, 3, 32, 32)).dtype == half.encode_text(CAPTIONS).dtype == torch.bfloat16


def test_conditioners_take_it(ours):
    image, text = CLIPImageConditioner(ours, size=32), CLIPTextConditioner(ours)
    frames = {image.views[0]: torch.rand(1, 16, 3, 32, 32)}
    assert image.conditions(frames).clip.shape == (1, image.sizes(2.0)["clip_len"], image.sizes(2.0)["clip_dim"]) == (1, 16, 24)
    assert text.conditions({}, CAPTIONS).text.shape == (3, text.sizes(2.0)["text_len"], text.sizes(2.0)["text_dim"]) == (3, 77, 32)


@pytest.mark.parametrize("name", ["clip.safetensors", "clip.pt"])
def test_a_loaded_model_is_frozen_and_movable(theirs, tmp_path, name):
    state = theirs.state_dict()
    if name.endswith("safetensors"):
        safetensors.torch.save_file(state, tmp_path / name)
    else:
        torch.save({"state_dict": state, "epoch": 32}, tmp_path / name)
    clip = load_clip(tmp_path / name, TINY).to("cpu")
    assert not clip.training and not any(p.requires_grad for p in clip.parameters())
    assert clip.encode_text(CAPTIONS).isfinite().all()


def test_what_does_not_fit_is_refused(ours, theirs, tmp_path):
    state = theirs.state_dict()
    del state["visual.proj"]
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(ValueError, match=r"part.pt does not fit CLIP: 1 missing \(visual.proj\); take a checkpoint of open_clip's tiny"):
        load_clip(tmp_path / "part.pt", TINY)
    with pytest.raises(ValueError, match="picture_size is 224: ViT-H-14-378-quickgelu sees 27 patches of 14 a side, choose 378 to 391"):
        CLIP(CLIPConfig(picture_size=224))
    with pytest.raises(ValueError, match="architecture is 'ViT-H-15': open_clip knows no such model"):
        CLIP(CLIPConfig(architecture="ViT-H-15"))
    with pytest.raises(ValueError, match="architecture is 'RN50': choose one with a plain vision transformer"):
        CLIP(CLIPConfig(architecture="RN50"))
    with pytest.raises(ValueError, match=r"takes frames \(B, T, 3, H, W\), not \(2, 3, 32, 32\)"):
        ours.encode_image(torch.rand(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"takes a list of captions, not one: \['a dog'\]"):
        ours.encode_text("a dog")
    with pytest.raises(ValueError, match="frames_at_once are 384, 0"):
        CLIPConfig(frames_at_once=0)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"^CLIP needs the package open_clip_torch: pip install 'foleyscale\[clip\]'"):
        CLIP(TINY)


def test_the_package_is_imported_when_first_needed():
    code = "import sys, models.encoders.clip; sys.exit(bool({'open_clip', 'timm', 'torchvision'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)

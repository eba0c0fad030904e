import pytest
import torch

from pipelines.metrics.linear_code import linear_code

TORCH = torch.Generator().manual_seed(0)
BASIS = torch.randn(3, 5 * 4, generator=TORCH)


def made(clips: int, windows: int = 6, rest: int = 0) -> torch.Tensor:
    """Log-mels of five bands whose windows of four frames mix three patterns, about a level."""
    rows = torch.randn(clips, windows, 3, generator=TORCH) @ BASIS - 4
    mel = rows.view(clips, windows, 5, 4).transpose(1, 2).flatten(2)
    return torch.cat([mel, torch.zeros(clips, 5, rest)], dim=2)


def test_what_has_three_patterns_needs_three_values():
    training, mel = [made(8), made(3)], made(4, rest=3)
    decoded, true = linear_code(training, mel, channels=2, window=4)  # 4 values a window
    assert torch.equal(true, mel[..., :24]) and torch.allclose(decoded, true, atol=1e-4)
    poorer, _ = linear_code(training, mel, channels=1, window=4)
    assert float((poorer - true).abs().mean()) > 0.1


def test_batches_do_not_matter():
    training, mel = made(12), made(2)
    one, _ = linear_code([training], mel, channels=1, window=4)
    many, _ = linear_code(training.split(5), mel, channels=1, window=4)
    assert one == pytest.approx(many, abs=1e-4)

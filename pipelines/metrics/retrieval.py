"""Audio-video retrieval in small galleries, and finding the right segment within one clip."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Recall", "recall_at_k", "right_segment_accuracy"]


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Recall at k, in [0, 1]."""

    k: int
    """How many of the best matches may hold the right one."""
    value: float
    """Mean over both directions and all galleries."""
    chance: float
    """What random embeddings reach: k / gallery size."""
    per_gallery: tuple[float, ...]
    """Mean over both directions, gallery by gallery: their spread is the uncertainty of `value`."""


def recall_at_k(video: np.ndarray, audio: np.ndarray, k: int, gallery: int = 64, galleries: int = 3, seed: int = 0) -> Recall:
    """R@k by cosine similarity of paired embeddings (N, D), row i of one belonging to row i of the other.

    Galleries are disjoint where N suffices, else seeded subsets that may overlap. A tie is drawn in expectation, so that a
    collapsed encoder (all embeddings equal) scores chance. ValueError: shapes differ, N < gallery, k > gallery, not finite.
    """
    video, audio = _unit_rows(video, "video"), _unit_rows(audio, "audio")
    if video.shape != audio.shape or video.ndim != 2:
        raise ValueError(f"recall_at_k takes two arrays of one shape (N, D), got video {video.shape} and audio {audio.shape}")
    if not 1 <= k <= gallery <= len(video) or galleries < 1:
        raise ValueError(f"recall_at_k needs 1 <= k <= gallery <= N and galleries >= 1, got k={k}, gallery={gallery}, N={len(video)}, "
                         f"galleries={galleries}: embed more clips or ask for a smaller gallery")
    scores = []
    for rows in _draw_galleries(len(video), gallery, galleries, seed):
        similarity = video[rows] @ audio[rows].T
        scores.append(float(np.mean([_hits(similarity, k), _hits(similarity.T, k)])))
    return Recall(k=k, value=float(np.mean(scores)), chance=k / gallery, per_gallery=tuple(scores))


def right_segment_accuracy(video: np.ndarray, audio: np.ndarray) -> np.ndarray:
    """Per clip (N,), how often an audio segment is nearest to its own video segment among the S of its clip; chance is 1 / S.

    `video`, `audio`: (N, S, D). Kind alone cannot solve this (all segments of a clip share it): it asks for timing.
    """
    video, audio = _unit_rows(video, "video"), _unit_rows(audio, "audio")
    if video.shape != audio.shape or video.ndim != 3:
        raise ValueError(f"right_segment_accuracy takes two arrays of one shape (N, S, D), got video {video.shape} and audio {audio.shape}")
    return np.array([_hits(own_audio @ own_video.T, 1) for own_video, own_audio in zip(video, audio, strict=True)])


def _unit_rows(embeddings: np.ndarray, name: str) -> np.ndarray:
    embeddings = np.asarray(embeddings, dtype=np.float64)
    if not np.isfinite(embeddings).all():
        raise ValueError(f"{name} embeddings hold NaN or infinity: the encoder that made them has diverged")
    return embeddings / np.maximum(np.linalg.norm(embeddings, axis=-1, keepdims=True), 1e-12)


def _draw_galleries(count: int, size: int, galleries: int, seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    if count >= size * galleries:
        return list(random.permutation(count)[: size * galleries].reshape(galleries, size))
    return [random.permutation(count)[:size] for _ in range(galleries)]


def _hits(similarity: np.ndarray, k: int) -> float:
    """Expected share of rows whose diagonal entry is among the k largest, ties broken at random."""
    own = np.diagonal(similarity)[:, None]
    # Sums in another order differ in the last bits: equal embeddings must still count as ties.
    ties = np.isclose(similarity, own, rtol=0.0, atol=1e-9)
    better = ((similarity > own) & ~ties).sum(axis=1)
    return float(np.clip((k - better) / ties.sum(axis=1), 0.0, 1.0).mean())

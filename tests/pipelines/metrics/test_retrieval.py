import numpy as np
import pytest
import torch

from pipelines.metrics.retrieval import recall_at_k, right_segment_accuracy

RANDOM = np.random.default_rng(0)


def test_equal_embeddings_are_always_found():
    embeddings = RANDOM.standard_normal((200, 16))
    found = recall_at_k(embeddings, 3.0 * embeddings, k=1)
    assert found.value == 1.0 and found.chance == 1 / 64 and found.per_gallery == (1.0, 1.0, 1.0)


def test_random_embeddings_score_chance():
    found = recall_at_k(RANDOM.standard_normal((6400, 8)), RANDOM.standard_normal((6400, 8)), k=5, galleries=100)
    assert found.value == pytest.approx(found.chance, abs=0.01)


def test_a_collapsed_encoder_scores_chance_exactly():
    collapsed = np.tile(RANDOM.standard_normal(16), (64, 1))
    assert recall_at_k(collapsed, collapsed, k=10).value == pytest.approx(10 / 64)


def test_known_ranks():
    video = np.eye(4)
    audio = np.eye(4)[[1, 0, 2, 3]]  # clips 0 and 1 hold each other's sound
    assert recall_at_k(video, audio, k=1, gallery=4, galleries=1).value == pytest.approx(0.5)
    # Behind the swapped match the own one ties with two others at cosine 0: one place left for three.
    assert recall_at_k(video, audio, k=2, gallery=4, galleries=1).value == pytest.approx((2 * 1 / 3 + 2) / 4)


def test_both_directions_count():
    # Every sound is nearest to video 0, whereas each video finds its own sound.
    video = np.array([[1.0, 0.0], [0.6, 0.8]])
    audio = np.array([[1.0, 0.0], [0.9, np.sqrt(0.19)]])
    assert recall_at_k(video, audio, k=1, gallery=2, galleries=1).value == pytest.approx((1.0 + 0.5) / 2)


def test_galleries_are_seeded_and_disjoint_where_clips_suffice():
    video, audio = RANDOM.standard_normal((2, 192, 4))
    audio = video + audio
    first = recall_at_k(video, audio, k=1, seed=3)
    assert first == recall_at_k(video, audio, k=1, seed=3)
    assert first.per_gallery != recall_at_k(video, audio, k=1, seed=4).per_gallery
    # Clip 0 is the only one that can be found, all others tie: of disjoint galleries exactly one holds it.
    video, audio = np.eye(192, 400), np.eye(192, 400, 200)
    audio[0] = video[0]
    values = recall_at_k(video, audio, k=1, seed=5).per_gallery
    assert sum(value > 1.5 / 64 for value in values) == 1


def test_takes_tensors():
    embeddings = torch.randn(64, 8)
    assert recall_at_k(embeddings, embeddings, k=1, galleries=1).value == 1.0


@pytest.mark.parametrize(("video", "audio", "k", "message"), [
    (np.ones((64, 2)), np.ones((63, 2)), 1, "one shape"),
    (np.ones((63, 2)), np.ones((63, 2)), 1, "gallery=64, N=63"),
    (np.ones((64, 2)), np.ones((64, 2)), 65, "k=65"),
    (np.full((64, 2), np.nan), np.ones((64, 2)), 1, "video embeddings hold NaN"),
])
def test_impossible_requests(video, audio, k, message):
    with pytest.raises(ValueError, match=message):
        recall_at_k(video, audio, k)


def test_right_segment():
    segments = RANDOM.standard_normal((5, 3, 16))
    assert right_segment_accuracy(segments, segments).tolist() == [1.0] * 5
    assert right_segment_accuracy(segments, segments[:, [1, 0, 2]]) == pytest.approx([1 / 3] * 5)
    # An encoder that knows only the kind of a clip is at chance.
    assert right_segment_accuracy(segments, segments[:, :1].repeat(3, axis=1)) == pytest.approx([1 / 3] * 5)
    with pytest.raises(ValueError, match=r"\(N, S, D\)"):
        right_segment_accuracy(segments[0], segments[0])

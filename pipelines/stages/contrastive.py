"""Stage 2: segment-level contrastive audio-video pretraining (SF-CAVP)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from data_prep.audio import log_mel
from data_prep.index import ShardSet
from models.checkpoints import fitted, read_checkpoint
from models.encoders.sf_cavp import SFCAVP
from models.pretrained import load_slowfast_r50, save_weights
from pipelines.config import Recipe
from pipelines.engine.draws import Draws
from pipelines.engine.log import Validation
from pipelines.engine.world import World
from pipelines.metrics.retrieval import recall_at_k, right_segment_accuracy
from pipelines.stages.data import clip_decoder, clips, training_stream
from pipelines.stages.stage import Stage


class ContrastiveStage(Stage):
    """Learns embeddings in which the sound and the picture of the same 1.28 s lie close."""

    name = "contrastive"

    def __init__(self, recipe: Recipe):
        self.recipe, self.config = recipe, recipe.contrastive
        self.train, self.seed = self.config.train, recipe.seed

    def build(self) -> nn.Module:
        """Fresh towers; the video tower from published weights where the recipe names them."""
        encoder = SFCAVP(self.config.model)
        if self.config.video_weights:
            load_video_tower(encoder, self.config.video_weights)
        return encoder

    def stream(self, world: World, quarantine: Path):
        """Consecutive segments of a clip from a random frame on, picture and sound aligned."""
        decode = clip_decoder(self.recipe, self.config.seconds, random_crop=True)
        shards = ShardSet.open(self.recipe.data, split=self.recipe.train_split)
        return training_stream(shards, decode, self.train, self.seed, world, quarantine)

    def inputs(self, batch: dict, draws: Draws, device: torch.device) -> dict[str, torch.Tensor]:
        """Frames (B, T, C, H, W) and log-mels (B, F, T). Frames stay bytes: a large batch of floats would not fit beside a chunk."""
        return {"frames": batch["frames"].to(device), "mel": log_mel(batch["waveform"].to(device), self.config.model.mel)}

    def backward(self, engine, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One pass over the whole batch, its activations or those of one chunk in memory."""
        return super().backward(engine, inputs | {"chunk": self.config.chunk})

    @torch.no_grad()
    def validate(self, module: nn.Module, device: torch.device) -> Validation:
        """Retrieval between held-out pictures and sounds, and which segment of a clip a sound belongs to."""
        video, audio = [], []
        for batch in clips(self.recipe, self.recipe.heldout_split, self.train.validation_clips):
            inputs = self.inputs(batch, None, device)
            video.append(module.encode_video(inputs["frames"]).segments)
            audio.append(module.encode_audio(inputs["mel"]).segments)
        video, audio = torch.cat(video), torch.cat(audio)
        found = retrieval_scalars(video, audio, self.recipe.evaluation.galleries)
        if video.shape[1] > 1:
            found["right_segment"] = float(right_segment_accuracy(video.cpu().numpy(), audio.cpu().numpy()).mean())
        return Validation(found)

    def export(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """The encoder."""
        encoder = SFCAVP(self.config.model)
        encoder.load_state_dict(weights)
        save_weights(encoder, self.config.model, folder)


def load_video_tower(encoder: SFCAVP, path: str) -> None:
    """Fill the video tower with PyTorchVideo's slowfast_r50. ValueError where the tower is another, or `path` holds something else."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"contrastive.video_weights names {path}, which is not there: fetch PyTorchVideo's SLOWFAST_8x8_R50.pyth")
    published = load_slowfast_r50(read_checkpoint(path))
    remedy = "choose contrastive.model=r50_kinetics, whose kernels are those of the published weights"
    fitted(encoder.video, published.state_dict(), f"contrastive.video_weights {path}", remedy)


def retrieval_scalars(video: torch.Tensor, audio: torch.Tensor, galleries: int) -> dict[str, float]:
    """R@1, R@5 and R@10 of whole clips, from their segment embeddings (N, S, D)."""
    video, audio = clip_embeddings(video), clip_embeddings(audio)
    gallery = min(64, len(video))
    return {f"r@{k}": recall_at_k(video, audio, k, gallery, galleries).value for k in (1, 5, 10) if k <= gallery}


def clip_embeddings(segments: torch.Tensor) -> np.ndarray:
    """Normalised segment embeddings (N, S, D) laid end to end (N, S * D): a cosine of clips is then the mean over their segments."""
    return torch.nn.functional.normalize(segments, dim=-1).flatten(1).cpu().numpy()

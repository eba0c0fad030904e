"""`foleyscale generate`: sound for videos, by a run's models or by published ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from data_prep.remote.urls import redacted
from launch.together import leaving_together
from launch.video_list import read_list


def generate(
    out: Annotated[Path, typer.Option("--out", help="Folder for the videos with sound.")],
    videos: Annotated[list[Path] | None, typer.Argument(help="Video files of any length; none for sound from the prompt alone.")] = None,
    video_list: Annotated[Path | None, typer.Option("--list", help="CSV in place of videos: video, prompt, negative_prompt.")] = None,
    run_folder: Annotated[Path | None, typer.Option("--run", help="Folder of a finished run.")] = None,
    stage: Annotated[str | None, typer.Option(help="Generator: generative, or preference/round-N; the round kept by default.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Published generator, mmaudio_<variant>.pth, in place of --run.")] = None,
    variant: Annotated[str, typer.Option(help="Which variant the checkpoint is, such as small_16k; by default as its name says.")] = "",
    vae: Annotated[Path | None, typer.Option(help="Published autoencoder: v1-16.pth or v1-44.pth.")] = None,
    vocoder: Annotated[Path | None, typer.Option(help="BigVGAN: best_netG.pt or bigvgan_generator.pt; else Griffin-Lim.")] = None,
    clip: Annotated[Path | None, typer.Option(help="CLIP's checkpoint of open_clip.")] = None,
    clip_architecture: Annotated[str, typer.Option(help="Its name in open_clip.")] = "ViT-H-14-378-quickgelu",
    clip_size: Annotated[int, typer.Option(help="Side of the pictures that it sees, pixels.")] = 384,
    synchformer: Annotated[Path | None, typer.Option(help="synchformer_state_dict.pth.")] = None,
    prompt: Annotated[str, typer.Option(help="What is to be heard.")] = "",
    negative_prompt: Annotated[str, typer.Option(help="What is not to be heard.")] = "",
    duration: Annotated[float | None, typer.Option(help="Seconds that get sound, in one piece; all of the video by default.")] = None,
    steps: Annotated[int | None, typer.Option(help="Euler steps; as the recipe says, 25 with published weights.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Strength of guidance; as the recipe says, 4.5 with published weights.")] = None,
    seed: Annotated[int, typer.Option(help="Another seed gives another sound.")] = 0,
    mask_away_clip: Annotated[bool, typer.Option("--mask-away-clip", help="Hide the pictures from CLIP; Synchformer sees them.")] = False,
    batch_size: Annotated[int, typer.Option(help="Windows generated together.")] = 4,
    precision: Annotated[str, typer.Option(help="Of the generator and the encoders: fp32 or bf16.")] = "fp32",
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the generator's blocks: slow to start, then quicker.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make files again that are there already.")] = False,
):
    """Give videos their sound; the pictures are copied, not re-encoded. Several processes (torchrun) share the videos."""
    if (run_folder is None) == (checkpoint is None):
        raise ValueError("name either --run or --checkpoint")
    if checkpoint and not vae:
        raise ValueError("--checkpoint needs the autoencoder that was published with it: --vae v1-16.pth or v1-44.pth")
    if videos and video_list:
        raise ValueError("name videos or a --list of them, not both")
    if checkpoint and not ((clip and synchformer) if videos or video_list else clip):
        raise ValueError("--checkpoint needs what it listens to: --clip for prompts, --clip and --synchformer for videos")
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"--precision is {precision}: choose fp32 or bf16")
    from models.encoders.clip import CLIPConfig
    from pipelines.generate import GenerateOptions, generate_files, targets
    from pipelines.sounding import PublicFiles, SoundModel

    options = GenerateOptions(prompt=prompt, negative_prompt=negative_prompt, duration=duration, steps=steps, guidance=guidance, seed=seed,
                              mask_away_clip=mask_away_clip, batch_size=batch_size, overwrite=overwrite)
    prompts = read_list(video_list) if video_list else {}
    videos = list(prompts) or videos or []
    targets(videos, out, prompt)  # what is wrong with them is said before gigabytes are loaded
    with leaving_together(_complain):
        rank, size, device = _place()
        if checkpoint:
            files = PublicFiles(checkpoint=checkpoint, vae=vae, vocoder=vocoder, clip=clip, synchformer=synchformer, variant=variant,
                                clip_model=CLIPConfig(architecture=clip_architecture, picture_size=clip_size))
            model = SoundModel.from_public(files, device)
        else:
            model = SoundModel.from_run(run_folder, device, stage)
        if precision == "bf16":
            model.generator.bfloat16()  # not autocast: it would cast frozen weights at every step, and its norms keep flash-attn away
        if compiled:
            model.generator.compile_blocks()
        generate_files(model, videos, out, options, (rank, size), typer.echo, prompts)


def _complain(line: str) -> None:
    typer.echo(f"foleyscale: {redacted(line)}", err=True)


def _place():
    """Which process this is, of how many, and its device. They share no memory, so no process group is joined."""
    import torch

    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not torch.cuda.is_available():
        return rank, size, torch.device("cpu")
    return rank, size, torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())

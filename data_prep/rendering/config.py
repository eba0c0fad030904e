"""What a rendered clip looks and sounds like."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RenderConfig:
    """Settings of one set of rendered clips."""

    size: int = 48
    """Side of the square picture, pixels (even, for 4:2:0 chroma)."""
    fps: float = 25.0
    """Frames per second."""
    seconds: float = 3.84
    """Length of a clip: a whole number of frames; 3.84 s is three segments of 32 frames at 25 fps."""
    sample_rate: int = 16000
    """Hz of the sound track."""
    kinds: tuple[str, ...] = ()
    """Kinds of events to draw from (keys of scene.KINDS); empty: all."""
    multi_share: float = 0.35
    """Share of clips with two or three kinds at once."""
    density: float = 1.0
    """Scale of the number of impulsive events; 1 gives two to four in 3.84 s, fewer of each kind where several share a clip."""
    min_gap: float = 0.35
    """Least seconds between two impulsive events of a clip: denser ones let shuffled pairs agree by chance."""
    brightness: float = 0.16
    """Upper limit of the background's brightness (1 = white): bright, varied backgrounds keep a contrastive loss from starting."""
    camera: float = 0.03
    """Reach of the camera's pan and shake, in picture widths."""
    noise_floor: float = -80.0
    """Level of the white noise under every clip, dBFS RMS, as of a good microphone: digital silence would flatter an autoencoder, and
    a loud floor is noise that none can code (two draws of it differ by 0.16 of the per-band mean's L1 at -60, by 0.07 at -80)."""
    crf: int = 20
    """x264 quality, 0 (lossless) to 51."""
    audio_bitrate: int = 64000
    """AAC bits per second."""

    def __post_init__(self):
        if self.size < 16 or self.size % 2:
            raise ValueError(f"RenderConfig.size is {self.size}: choose an even number of pixels, at least 16")
        if self.fps <= 0 or self.sample_rate < 8000:
            raise ValueError(f"RenderConfig.fps, sample_rate are {self.fps}, {self.sample_rate}: need fps > 0 and at least 8000 Hz")
        if self.seconds < 1.5 or abs(self.seconds * self.fps - self.frames) > 1e-6:
            raise ValueError(f"RenderConfig.seconds is {self.seconds}: choose at least 1.5 and whole frames at {self.fps} fps")
        if not 0 <= self.multi_share <= 1:
            raise ValueError(f"RenderConfig.multi_share is {self.multi_share}: choose a share from 0 to 1")
        if self.density <= 0:
            raise ValueError(f"RenderConfig.density is {self.density}: choose a positive scale")
        longest = round((self.seconds - 0.4) / 2, 2)
        if not 0.05 <= self.min_gap <= longest:
            raise ValueError(f"RenderConfig.min_gap is {self.min_gap}: choose 0.05 to {longest}, for three events in {self.seconds} s")
        if not 0 <= self.brightness <= 1 or not 0 <= self.camera <= 0.2:
            raise ValueError(f"RenderConfig.brightness, camera are {self.brightness}, {self.camera}: choose 0 to 1 and 0 to 0.2")
        if self.noise_floor > -20:
            raise ValueError(f"RenderConfig.noise_floor is {self.noise_floor} dBFS: choose -20 or less, or the events drown")

    @property
    def frames(self) -> int:
        """Pictures per clip."""
        return round(self.seconds * self.fps)

    @property
    def samples(self) -> int:
        """Audio samples per clip."""
        return round(self.seconds * self.sample_rate)

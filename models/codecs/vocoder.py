"""Temporary."""
import torch
from torch import nn
class GriffinLim(nn.Module):
    """Temporary."""
    name = "griffin_lim"
    def __init__(self, spec):
        super().__init__(); self.spec = spec
        from data_prep.audio import mel_basis
        self.register_buffer("inv", torch.linalg.pinv(torch.as_tensor(mel_basis(spec)).float()), persistent=False)
        self.register_buffer("w", torch.hann_window(spec.win), persistent=False)
    def vocode(self, mel):
        s=self.spec
        lin = (10**mel if s.log=="log10" else mel.exp())
        mag=(self.inv@lin).clamp_min(1e-5)
        n=mel.shape[-1]*s.hop
        p=(s.n_fft-s.hop)//2
        ang=torch.exp(2j*torch.pi*torch.rand(mag.shape,generator=torch.Generator().manual_seed(0)))
        def ist(x): return torch.istft(torch.nn.functional.pad(x,(0,0)),s.n_fft,s.hop,s.win,self.w,center=True,length=(mel.shape[-1]-1)*s.hop)
        for _ in range(16):
            y=ist(mag*ang)
            r=torch.stft(y,s.n_fft,s.hop,s.win,self.w,center=True,return_complex=True)
            ang=r/r.abs().clamp_min(1e-8)
        y=ist(mag*ang)
        return torch.nn.functional.pad(y,(0,n-y.shape[-1]))

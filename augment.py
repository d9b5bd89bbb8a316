"""What training does to an utterance, so that the model has heard other noises, rooms and microphones.

Pure functions of what they are given, a random generator among it. Needs torch and numpy and imports nothing of ours,
so it can be copied alone: functions take `options`, any object with the attributes of the config's data section.
Dims: N samples, T frames, F feature bins (num_mels * lfr_m). Source: SpecAugment (Park et al. 2019).
"""
import numpy as np
import torch
from torch import Tensor


def generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """A random generator that these three numbers decide, whatever is drawn before it and in whichever process."""
    return np.random.default_rng((seed, epoch, index))


def add_noise(samples: Tensor, snr_db: tuple[float, float], rng: np.random.Generator) -> Tensor:
    """samples (N,) -> samples + noise, at a signal-to-noise ratio in dB drawn from snr_db (low, high). The noise is
    w[t] + c w[t-1] with w white and c drawn from 0 to 1."""
    white = rng.standard_normal(len(samples) + 1, dtype=np.float32)
    noise = torch.from_numpy(white[1:] + np.float32(rng.uniform()) * white[:-1])
    return mix(samples, noise, rng.uniform(*snr_db))


def mix(samples: Tensor, noise: Tensor, snr_db: float) -> Tensor:
    """samples (N,), noise (M,), M >= 1 -> (N,): samples + noise, repeated or cut to N, at a signal-to-noise ratio in
    dB. The signal's power is that without its DC offset. Silence adds nothing."""
    noise = noise.repeat(-(-len(samples) // len(noise)))[:len(samples)]
    level = 10 ** (-snr_db / 20) * samples.std(correction=0)
    return samples + noise * (level / noise.square().mean().sqrt().clamp(min=1e-20))


def reverberate(samples: Tensor, response: Tensor) -> Tensor:
    """samples (N,) as heard in a room with the impulse response (M,): their convolution, with the energy that samples
    had. The largest sample of response, the direct sound, leaves every word where it was; N samples remain."""
    size = len(samples) + len(response) - 1
    spectrum = torch.fft.rfft(samples, size) * torch.fft.rfft(response, size)
    direct = int(response.abs().argmax())
    heard = torch.fft.irfft(spectrum, size)[direct:direct + len(samples)]
    return heard * (samples.norm() / heard.norm().clamp(min=1e-20))


def mask_span(size: int, widest: int, rng: np.random.Generator) -> np.ndarray:
    """(size,) bool, False in one random span of 0..widest entries, True elsewhere."""
    width = rng.integers(min(widest, size) + 1)
    start = rng.integers(size - width + 1)
    place = np.arange(size)
    return (place < start) | (place >= start + width)


def random_channel(num_mels: int, std: float, rng: np.random.Generator) -> np.ndarray:
    """What another microphone or room adds to log energies: a smooth curve over the mel bins, (num_mels,). It is a
    constant and three cosines of 1 to 3 half periods, each times a normal number of deviation `std`."""
    phase = np.pi * (np.arange(num_mels) + 0.5) / num_mels
    return (rng.normal(0, std, (4, 1)) * np.cos(np.arange(4)[:, None] * phase)).sum(0)


def spec_augment(feats: Tensor, options, rng: np.random.Generator) -> Tensor:
    """Normalised feats (T,F) -> a copy with a random channel, and random bands and spans of time set to 0, the mean.
    options.augment: channel_std as in random_channel; freq_masks bands of 0..freq_width mel bins; time_masks spans of
    0..time_width frames, each at most time_share of T. Each of the F / options.num_mels frames that lfr stacked has the
    same channel and the same bands masked.
    Source: Park et al. 2019, without time warping; the channel is ours."""
    mels = options.num_mels
    augment = options.augment
    if feats.dim() != 2 or feats.shape[1] % mels:
        raise ValueError(f"feats must be (T, a multiple of {mels}), got {tuple(feats.shape)}")
    T, F = feats.shape
    if augment.channel_std:
        channel = np.tile(random_channel(mels, augment.channel_std, rng), F // mels)
        feats = feats + torch.from_numpy(channel).to(feats)
    bins = np.ones(mels, bool)
    frames = np.ones(T, bool)
    for _ in range(augment.freq_masks):
        bins &= mask_span(mels, augment.freq_width, rng)
    for _ in range(augment.time_masks):
        frames &= mask_span(T, min(augment.time_width, int(augment.time_share * T)), rng)
    keep = frames[:, None] & np.tile(bins, F // mels)
    return feats * torch.from_numpy(keep).to(feats)

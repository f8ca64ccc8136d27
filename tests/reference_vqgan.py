"""Upstream VQGAN and MoVQGAN in their own key layout, from the published description: plain functions over a state dict.

Shares no code with ``arsd``, so that agreement of the two means something. Small and slow on purpose. Other tests take
their tiny tokenizers from here: ``vqgan_state(mult=(1, 1), codes=32)`` halves each side, ``movq_state(mult=(1, 2, 2))``
makes a quarter of it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]


def vqgan_state(
    *,
    ch: int = 32,
    mult: tuple[int, ...] = (1, 1, 2, 2, 4),
    blocks: int = 2,
    attention: tuple[int, ...] = (),
    z: int = 24,
    dim: int = 16,
    codes: int = 64,
    seed: int = 0,
) -> State:
    """Random float32 weights of taming's VQGAN; by default Chameleon's topology (f = 16, attention in the middle only).

    Published: ch=128, z=256, dim=256, codes=8192. The factor is 2 ** (len(mult) - 1).

    Args:
        ch: channels at full resolution, a multiple of 32 (the group normalisations have 32 groups).
        mult: channels per resolution as multiples of ``ch``, from the full resolution down; the first must be 1.
        blocks: residual blocks per resolution (one more in the decoder).
        attention: indices into ``mult`` of the resolutions that attend.
        z: latent channels of encoder and decoder.
        dim: dimension of a code.
        codes: size of the codebook.
        seed: of the generator; the global one is left alone.
    """
    return _state(False, [ch * m for m in mult], blocks, attention, z, dim, codes, seed)


def movq_state(
    *,
    ch: int = 32,
    mult: tuple[int, ...] = (1, 2, 2, 4),
    blocks: int = 2,
    attention: tuple[int, ...] | None = None,
    z: int = 4,
    codes: int = 64,
    seed: int = 0,
) -> State:
    """Random float32 weights of MoVQGAN; by default that of movqgan_*.ckpt (f = 8, the lowest resolution attends).

    Published: ch=256, z=4, codes=16384. Arguments as in :func:`vqgan_state`; a code has ``z`` channels, and ``attention``
    is the lowest resolution unless it is given.
    """
    lowest = (len(mult) - 1,) if attention is None else attention
    return _state(True, [ch * m for m in mult], blocks, lowest, z, z, codes, seed)


def extra_state(*, seed: int = 0) -> State:
    """What training leaves in such files beside the tokenizer: loss networks, a discriminator, running averages."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "loss.logvar": (),
        "loss.perceptual_loss.scaling_layer.shift": (1, 3, 1, 1),
        "loss.discriminator.main.0.weight": (8, 3, 4, 4),
        "ema_encoder.conv_inweight": (32, 3, 3, 3),
        "model_ema.decoderconv_inbias": (32,),
    }
    extra = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    return extra | {"ema_encoder.num_updates": torch.tensor(-1, dtype=torch.int32)}


def _state(
    spatial: bool, widths: list[int], blocks: int, attending: tuple[int, ...], z: int, dim: int, codes: int, seed: int
) -> State:
    generator = torch.Generator().manual_seed(seed)
    state: State = {}

    def conv(key: str, out: int, inside: int, kernel: int = 1, gain: float = 1.2) -> None:
        weight = torch.randn(out, inside, kernel, kernel, generator=generator)
        state[key + ".weight"] = weight * gain / (inside * kernel**2) ** 0.5
        state[key + ".bias"] = 0.1 * torch.randn(out, generator=generator)

    def norm(key: str, width: int) -> None:
        inner = key + ".norm_layer" if spatial and key.startswith("decoder.") else key
        state[inner + ".weight"] = 1 + 0.2 * torch.randn(width, generator=generator)
        state[inner + ".bias"] = 0.1 * torch.randn(width, generator=generator)
        if inner != key:
            conv(key + ".conv_y", width, dim, gain=0.4)
            state[key + ".conv_y.bias"] += 1
            conv(key + ".conv_b", width, dim, gain=0.4)

    def residual(key: str, inside: int, out: int) -> int:
        norm(key + ".norm1", inside)
        conv(key + ".conv1", out, inside, 3)
        norm(key + ".norm2", out)
        conv(key + ".conv2", out, out, 3)
        if inside != out:
            conv(key + ".nin_shortcut", out, inside)
        return out

    def attention(key: str, width: int) -> None:
        norm(key + ".norm", width)
        for name in ("q", "k", "v", "proj_out"):
            conv(f"{key}.{name}", width, width, gain=1.2)

    def middle(side: str) -> None:
        residual(side + ".mid.block_1", widths[-1], widths[-1])
        attention(side + ".mid.attn_1", widths[-1])
        residual(side + ".mid.block_2", widths[-1], widths[-1])

    def level(here: str, i: int, width: int, depth: int) -> int:
        for j in range(depth):
            width = residual(f"{here}.block.{j}", width, widths[i])
            if i in attending:
                attention(f"{here}.attn.{j}", width)
        return width

    conv("encoder.conv_in", widths[0], 3, 3, gain=2)
    width = widths[0]
    for i in range(len(widths)):
        width = level(f"encoder.down.{i}", i, width, blocks)
        if i < len(widths) - 1:
            conv(f"encoder.down.{i}.downsample.conv", width, width, 3)
    middle("encoder")
    norm("encoder.norm_out", width)
    conv("encoder.conv_out", z, width, 3, gain=2)
    conv("decoder.conv_in", width, z, 3)
    middle("decoder")
    for i in reversed(range(len(widths))):
        width = level(f"decoder.up.{i}", i, width, blocks + 1)
        if i:
            conv(f"decoder.up.{i}.upsample.conv", width, width, 3)
    norm("decoder.norm_out", width)
    conv("decoder.conv_out", 3, width, 3, gain=0.4)
    state["quantize.embedding.weight"] = torch.randn(codes, dim, generator=generator) * 1.3
    conv("quant_conv", dim, z)
    conv("post_quant_conv", z, dim)
    return state


def latents(state: State, images: Tensor) -> Tensor:
    """Latents [B, h, w, e] of images [B, 3, H, W]."""
    x = _conv(state, "encoder.conv_in", images)
    i = 0
    while f"encoder.down.{i}.block.0.conv1.weight" in state:
        x = _level(state, f"encoder.down.{i}", x)
        if f"encoder.down.{i}.downsample.conv.weight" in state:  # padded at the right and the bottom only
            x = _conv(state, f"encoder.down.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
        i += 1
    x = _middle(state, "encoder", x)
    x = _conv(state, "encoder.conv_out", F.silu(_norm(state, "encoder.norm_out", x)))
    return _conv(state, "quant_conv", x).permute(0, 2, 3, 1)


def encode(state: State, images: Tensor) -> Tensor:
    """Ids [B, h, w] of the codes with the smallest Euclidean distance."""
    differences = latents(state, images)[..., None, :] - state["quantize.embedding.weight"]
    return differences.square().sum(-1).argmin(-1)


def decode(state: State, ids: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] of ids [B, h, w]."""
    codes = state["quantize.embedding.weight"][ids].permute(0, 3, 1, 2)
    x = _conv(state, "decoder.conv_in", _conv(state, "post_quant_conv", codes))
    x = _middle(state, "decoder", x, codes)
    for i in reversed(range(sum(key.endswith(".block.0.conv1.weight") and ".up." in key for key in state))):
        x = _level(state, f"decoder.up.{i}", x, codes)
        if i:
            x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
            x = _conv(state, f"decoder.up.{i}.upsample.conv", x)
    return _conv(state, "decoder.conv_out", F.silu(_norm(state, "decoder.norm_out", x, codes)))


def _conv(state: State, key: str, x: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
    weight = state[key + ".weight"]
    return F.conv2d(x, weight, state[key + ".bias"], stride, weight.shape[-1] // 2 if padding is None else padding)


def _norm(state: State, key: str, x: Tensor, codes: Tensor | None = None) -> Tensor:
    """32 groups; with ``conv_y`` and ``conv_b`` in the state: scaled and shifted by the codes of the same place."""
    if key + ".conv_y.weight" not in state:
        return F.group_norm(x, 32, state[key + ".weight"], state[key + ".bias"], 1e-6)
    assert codes is not None
    factor = x.shape[-1] // codes.shape[-1]
    spread = codes.repeat_interleave(factor, -1).repeat_interleave(factor, -2)  # nearest neighbour
    normed = F.group_norm(x, 32, state[key + ".norm_layer.weight"], state[key + ".norm_layer.bias"], 1e-6)
    return _conv(state, key + ".conv_y", spread) * normed + _conv(state, key + ".conv_b", spread)


def _residual(state: State, key: str, x: Tensor, codes: Tensor | None = None) -> Tensor:
    inner = _conv(state, key + ".conv1", F.silu(_norm(state, key + ".norm1", x, codes)))
    inner = _conv(state, key + ".conv2", F.silu(_norm(state, key + ".norm2", inner, codes)))
    return inner + (_conv(state, key + ".nin_shortcut", x) if key + ".nin_shortcut.weight" in state else x)


def _attention(state: State, key: str, x: Tensor, codes: Tensor | None = None) -> Tensor:
    """One head over all places."""
    normed = _norm(state, key + ".norm", x, codes)
    q, k, v = (_conv(state, f"{key}.{name}", normed).flatten(2) for name in "qkv")
    weights = (torch.einsum("bcq,bck->bqk", q, k) / q.shape[1] ** 0.5).softmax(-1)
    return x + _conv(state, key + ".proj_out", torch.einsum("bqk,bck->bcq", weights, v).reshape(x.shape))


def _level(state: State, here: str, x: Tensor, codes: Tensor | None = None) -> Tensor:
    j = 0
    while f"{here}.block.{j}.conv1.weight" in state:
        x = _residual(state, f"{here}.block.{j}", x, codes)
        x = _attention(state, f"{here}.attn.{j}", x, codes) if f"{here}.attn.{j}.q.weight" in state else x
        j += 1
    return x


def _middle(state: State, side: str, x: Tensor, codes: Tensor | None = None) -> Tensor:
    x = _residual(state, side + ".mid.block_1", x, codes)
    x = _attention(state, side + ".mid.attn_1", x, codes)
    return _residual(state, side + ".mid.block_2", x, codes)

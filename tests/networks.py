"""Networks that nobody here wrote, and small ones that use layers in the ways that are easy to get wrong."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def randomised(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network in eval mode with every parameter random, the ones that are zero at the start too."""
    torch.manual_seed(seed)
    model = make()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(
                torch.randn(p.shape, generator=generator) * (0.3 / max(1, p.shape[-1]) ** 0.5 if p.ndim > 1 else 0.1)
            )
            if p.ndim == 1:
                p.add_(0.5)
    return model.eval()


class Scaled(nn.Module):
    """Scales what it is given, whatever the time is."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Its input, times the scale."""
        return self.scale * x


def unet_2d(attention: bool, **options: Any) -> nn.Module:
    """A small U-Net, with other ``options`` of its class where asked for."""
    from diffusers import UNet2DModel

    kind = "AttnDownBlock2D" if attention else "DownBlock2D"
    config = dict(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", kind),
        up_block_types=(kind.replace("Down", "Up"), "UpBlock2D"),
        add_attention=attention,
    )
    return UNet2DModel(**{**config, **options})


def small_unet(attention: bool = False, **options: Any) -> nn.Module:
    """A U-Net of one block each way, for what holds for every network."""
    kind = "AttnDownBlock2D" if attention else "DownBlock2D"
    blocks = {"down_block_types": (kind,), "up_block_types": (kind.replace("Down", "Up"),), "mid_block_type": None}
    return unet_2d(attention, **{**blocks, "block_out_channels": (16,), **options})


def unet_2d_condition(**options: Any) -> nn.Module:
    """A small U-Net with cross-attention, with other ``options`` of its class where asked for."""
    from diffusers import UNet2DConditionModel

    config = dict(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return UNet2DConditionModel(**{**config, **options})


def dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        out_channels=3,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )


def pixart() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=3,
        out_channels=3,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        cross_attention_dim=16,
        caption_channels=12,
        use_additional_conditions=False,
    )


def unet_1d() -> nn.Module:
    from diffusers import UNet1DModel

    return UNet1DModel(
        sample_size=32, in_channels=2, out_channels=2, extra_in_channels=64, block_out_channels=(32, 32, 64)
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 16), nn.SiLU(), nn.LayerNorm(16), nn.RMSNorm(16), nn.Linear(16, 5))


class GRUDenoiser(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.inner = nn.Linear(3, 8)
        self.gru = nn.GRU(8, 8, batch_first=batch_first)
        self.outer = nn.Linear(8, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.inner(x) + t.view(-1, 1, 1)
        h, last = self.gru(h if self.batch_first else h.transpose(0, 1))
        h = h if self.batch_first else h.transpose(0, 1)
        return self.outer(h) + last[0].mean(-1)[:, None, None]


class Transformer(nn.Module):
    """Learned positions and a class token at the root; layers in either batch order."""

    def __init__(self, batch_first: bool, norm_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.inner = nn.Linear(4, 16)
        self.positions = nn.Parameter(torch.zeros(1, 6, 16))
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.outer = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x) + self.positions
        h = torch.cat([self.token.expand(h.shape[0], -1, -1), h], 1)
        h = self.encoder(h if self.batch_first else h.transpose(0, 1))
        return self.outer(h if self.batch_first else h.transpose(0, 1))[:, 1:]


class GroupNorm32(nn.GroupNorm):
    """As in guided-diffusion: a subclass with its own forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


class FunctionalConv(nn.Module):
    """As in EDM: a convolution of its own class that calls the function, and a fixed filter."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels_out, channels_in, 3, 3))
        self.bias = nn.Parameter(torch.zeros(channels_out))
        self.register_buffer("resample_filter", torch.ones(1, 1, 2, 2) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.resample_filter.tile([x.shape[1], 1, 1, 1]), groups=x.shape[1], padding=1)
        return F.conv2d(x, self.weight.to(x.dtype), padding=1).add_(self.bias.to(x.dtype).reshape(1, -1, 1, 1))


class EDMLike(nn.Module):
    """Noise level without batch, weight normalisation, batch normalisation, fixed random frequencies per member."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(2), requires_grad=False)
        self.embed = nn.Linear(2, 8)
        self.conv = FunctionalConv(2, 8)
        self.norms = nn.Sequential(nn.BatchNorm2d(8), GroupNorm32(2, 8))
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.outer = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 2, 3, padding=1, padding_mode="circular"))

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        level = sigma.to(torch.float32).reshape(-1, 1) * self.frequencies[None]
        emb = F.silu(self.embed(level)).unsqueeze(2).unsqueeze(3)
        return self.outer(self.up(F.silu(self.norms(self.conv(x)) + emb)))


class ResidualBlock(nn.Module):
    """As in torchvision's ResNet: batch normalisation, activations in place, a projected shortcut."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.downsample = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.downsample(x)
        return self.relu(out)


class LayerNorm2d(nn.LayerNorm):
    """As in torchvision's ConvNeXt: a subclass with its own forward."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """As in torchvision's ConvNeXt: a raw layer scale beside a depthwise convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer_scale = nn.Parameter(torch.ones(channels, 1, 1))
        self.norm = LayerNorm2d(channels)
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        h = self.mlp(self.norm(self.depthwise(x)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.layer_scale * h + x


class SqueezeExcitation(nn.Module):
    """As in torchvision's operations: pooled to one pixel, gated by channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(self.pool(x)), inplace=True)))


def vision_blocks() -> nn.Module:
    return nn.Sequential(ResidualBlock(3, 8, 2), ConvNeXtBlock(8), SqueezeExcitation(8), nn.ConvTranspose2d(8, 3, 2, 2))


class MagnitudePreserving(nn.Module):
    """Weights normalised in the pass and a learned gain, as in EDM2, and a 1x1 layer by einsum, as in score_sde."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.randn(8))
        self.embed, self.mix = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
        self.inner, self.outer = nn.Parameter(torch.randn(8, 2, 3, 3)), nn.Parameter(torch.randn(2, 8, 3, 3))
        self.gain = nn.Parameter(torch.ones(()))

    @staticmethod
    def normalised(w: Any) -> Any:
        norm = torch.linalg.vector_norm(w, dim=list(range(1, w.ndim)), keepdim=True)
        return w / torch.add(1e-4, norm, alpha=(norm.numel() / w.numel()) ** 0.5)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        emb = (
            torch.cos(noise.ger(self.frequencies.to(noise)))
            @ (self.normalised(self.embed) / self.embed[0].numel() ** 0.5).t()
        )
        h = F.silu(F.conv2d(x, self.normalised(self.inner), padding=(1,)) * (1 + emb[:, :, None, None]))
        h = h + torch.einsum("abcd,dE->abcE", h.permute(0, 2, 3, 1), self.mix).permute(0, 3, 1, 2)
        return F.conv2d(h, self.normalised(self.outer) * (self.gain / 3), padding=1)


def rows(batch: int, *shape: int) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Arguments]]] = {
    "mlp": (mlp, lambda b: ((rows(b, 5),), {})),
    "unet_2d": (lambda: unet_2d(False), lambda b: ((rows(b, 1, 8, 8), torch.tensor(7)), {})),
    "unet_2d_attention": (
        lambda: unet_2d(True),
        lambda b: ((rows(b, 1, 8, 8), torch.arange(b) + 3), {"return_dict": False}),
    ),
    "unet_2d_condition": (
        unet_2d_condition,
        lambda b: ((rows(b, 3, 8, 8), 5), {"encoder_hidden_states": rows(b, 4, 12)}),
    ),
    "dit": (dit, lambda b: ((rows(b, 3, 8, 8),), {"timestep": torch.arange(b), "class_labels": torch.arange(b) % 5})),
    "unet_1d": (unet_1d, lambda b: ((rows(b, 2, 32), torch.tensor(4)), {})),
    "pixart": (
        pixart,
        lambda b: (
            (rows(b, 3, 8, 8),),
            {
                "encoder_hidden_states": rows(b, 4, 12),
                "timestep": torch.arange(b),
                "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            },
        ),
    ),
    "gru": (lambda: GRUDenoiser(True), lambda b: ((rows(b, 7, 3), rows(b)), {})),
    "gru_time_first": (lambda: GRUDenoiser(False), lambda b: ((rows(b, 7, 3), rows(b)), {})),
    "transformer": (lambda: Transformer(True, False), lambda b: ((rows(b, 6, 4),), {})),
    "transformer_time_first": (lambda: Transformer(False, True), lambda b: ((rows(b, 6, 4),), {})),
    "vision_blocks": (vision_blocks, lambda b: ((rows(b, 3, 8, 8),), {})),
    "magnitude_preserving": (MagnitudePreserving, lambda b: ((rows(b, 2, 8, 8), rows(b)), {})),
    "edm_like": (EDMLike, lambda b: ((rows(b, 2, 8, 8), torch.tensor(0.3)), {})),
}


def tensor_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]

"""Every layer that the fold knows, in every variant that its arguments allow, equals the stack of its members."""

import pytest
import torch
from torch import nn

import fastens
from fastens.ops.draw_members import draw_members
from tests.networks import randomised
from tests.tolerances import NETWORK, relative_error


class SelfAttention(nn.Module):
    def __init__(self, batch_first, masked=False, **options):
        super().__init__()
        self.batch_first, self.masked = batch_first, masked
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)
        self.key = nn.Linear(8, options.get("kdim") or 8)
        self.value = nn.Linear(8, options.get("vdim") or 8)

    def forward(self, x):
        mask = torch.arange(x.shape[1]).expand(x.shape[:2]) > 3 if self.masked else None
        x = x if self.batch_first else x.transpose(0, 1)
        y, weights = self.attention(x, self.key(x), self.value(x), key_padding_mask=mask, average_attn_weights=False)
        return (y if self.batch_first else y.transpose(0, 1)).sum(-1, keepdim=True) + weights.mean((1, 3))[..., None]


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x):
        return self.layer(x, x.flip(1))


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.layer = kind(8, 8, batch_first=True, **options)

    def forward(self, x):
        return self.layer(x)[0]


def image(*shape):
    return lambda batch: torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))


def tokens(batch):
    return torch.randint(7, (batch, 5), generator=torch.Generator().manual_seed(batch))


SEQUENCE = image(6, 8)
LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), image(5)),
    "linear over more dimensions, no bias": (lambda: nn.Linear(5, 3, bias=False), image(2, 4, 5)),
    "conv1d dilated": (lambda: nn.Conv1d(4, 6, 3, padding=2, dilation=2), image(4, 9)),
    "conv2d strided": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), image(4, 9, 7)),
    "conv2d grouped, no bias": (lambda: nn.Conv2d(4, 8, 3, groups=2, bias=False), image(4, 6, 6)),
    "conv2d depthwise, same": (lambda: nn.Conv2d(4, 4, 3, padding="same", groups=4), image(4, 6, 6)),
    "conv2d reflect": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), image(4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 3, padding=1), image(2, 4, 5, 6)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), image(4, 5)),
    "conv_transpose2d grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), image(4, 5, 5)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2, bias=False), image(2, 3, 3, 3)),
    "group_norm": (lambda: nn.GroupNorm(2, 8), image(8, 5, 5)),
    "layer_norm over two dimensions": (lambda: nn.LayerNorm((3, 5)), image(4, 3, 5)),
    "layer_norm without bias": (lambda: nn.LayerNorm(5, bias=False), image(4, 5)),
    "rms_norm": (lambda: nn.RMSNorm(5), image(4, 5)),
    "batch_norm1d": (lambda: nn.BatchNorm1d(5), image(5)),
    "batch_norm2d": (lambda: nn.BatchNorm2d(3), image(3, 4, 4)),
    "batch_norm3d": (lambda: nn.BatchNorm3d(3), image(3, 2, 4, 4)),
    "embedding": (lambda: nn.Embedding(7, 4, padding_idx=0), tokens),
    "attention": (lambda: SelfAttention(True), SEQUENCE),
    "attention, time first": (lambda: SelfAttention(False), SEQUENCE),
    "attention with a mask": (lambda: SelfAttention(True, masked=True), SEQUENCE),
    "attention with other keys": (lambda: SelfAttention(True, kdim=6, vdim=4, bias=False), SEQUENCE),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), SEQUENCE),
    "encoder layer, norm first": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True),
        SEQUENCE,
    ),
    "decoder layer": (Decoder, SEQUENCE),
    "gru": (lambda: Recurrent(nn.GRU), SEQUENCE),
    "lstm": (lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), SEQUENCE),
}


@pytest.mark.parametrize("num_members", [1, 2, 5])
@pytest.mark.parametrize("name", LAYERS)
def test_folded_layer_equals_the_members(name, num_members):
    make, rows = LAYERS[name]
    members = [randomised(lambda: nn.Sequential(make()), seed) for seed in range(num_members)]
    ensemble = fastens.Ensemble(members, engine="fold")
    with torch.no_grad():
        for batch in (1, 2, 4):
            x = rows(batch)
            expected = torch.stack([member(x) for member in members])
            assert relative_error(ensemble.member_outputs(x), expected) < NETWORK[torch.float32]
    assert ensemble.engine == "fold"
    assert not ensemble.report().looped


@pytest.mark.parametrize("name", LAYERS)
def test_ragged_rows_reach_their_member(name):
    make, rows = LAYERS[name]
    members = [randomised(lambda: nn.Sequential(make()), seed) for seed in range(3)]
    ensemble = fastens.Ensemble(members, "mixture", engine="fold")
    x = rows(4)
    with torch.no_grad(), ensemble.trajectory(4, 3):
        drawn = draw_members(3, 0, 3, 4)
        stack = torch.stack([member(x) for member in members])
        assert relative_error(ensemble(x), stack[drawn, torch.arange(4)]) < NETWORK[torch.float32]
    assert len(set(drawn.tolist())) > 1
    assert ensemble.engine == "fold"

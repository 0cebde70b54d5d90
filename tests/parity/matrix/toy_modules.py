"""Plain modules with what LoRA can adapt, or trains in full, outside transformers.

Each forward takes `input_ids`, tokens or real numbers, and returns a tensor.
"""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

WIDTH, HIDDEN, CLASSES, WORDS = 10, 16, 8, 20


class Perceptron(nn.Module):
    """Two linear layers and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(WIDTH, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.lin1 = nn.Linear(HIDDEN, CLASSES)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lin1(torch.tanh(self.norm(self.lin0(input_ids))))


class Transposed(nn.Module):
    """An embedding, a `Conv1D` of transformers and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(WORDS, 8)
        self.conv1d = Conv1D(HIDDEN, 8)
        nn.init.normal_(self.conv1d.weight, std=0.3)
        self.lin = nn.Linear(HIDDEN, CLASSES)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lin(torch.tanh(self.conv1d(self.emb(input_ids))))


class Attention(nn.Module):
    """torch's own attention, which reads its weights instead of calling layers."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.lin = nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids: Tensor) -> Tensor:
        attended, _ = self.mha(input_ids, input_ids, input_ids)
        return self.lin(attended)


class TorchEncoder(nn.Module):
    """torch's own encoder layers, which read their weights in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, HIDDEN, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.encoder(input_ids))


class BareParameters(nn.Module):
    """Weights that belong to no layer: a matrix, and a stack of them."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(0.3 * torch.randn(HIDDEN, WIDTH))
        self.stack = nn.Parameter(0.3 * torch.randn(3, HIDDEN, HIDDEN))
        self.lin = nn.Linear(HIDDEN, CLASSES)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = torch.tanh(input_ids @ self.matrix.T)
        mixed = torch.einsum("...i,kio->...o", hidden, self.stack)
        return self.lin(torch.tanh(mixed))


class NestedLists(nn.Module):
    """Lists of lists and a dictionary of layers, under numbers instead of names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.ModuleDict({"up": nn.Linear(WIDTH, WIDTH)})])
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES))

    def forward(self, input_ids: Tensor) -> Tensor:
        for first, others in self.layers:
            input_ids = input_ids + torch.tanh(others["up"](torch.tanh(first(input_ids))))
        return self.out(self.norm(input_ids))


class Listed(nn.Module):
    """A `ParameterList` next to a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([torch.ones(WIDTH), 0.5 * torch.ones(HIDDEN)])
        self.lin0 = nn.Linear(WIDTH, HIDDEN)
        self.lin1 = nn.Linear(HIDDEN, CLASSES)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.lin0(input_ids * self.scales[0]))
        return self.lin1(hidden * self.scales[1])


class Tied(nn.Module):
    """A head that has the embedding's weight, without a config that states it."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(WORDS, WIDTH)
        self.lin = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.lin(self.emb(input_ids))))


class Grouped(nn.Module):
    """2-D convolutions in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(4, 8, 3, groups=2)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = torch.tanh(self.conv1(torch.tanh(self.conv0(input_ids))))
        return self.head(x.mean(dim=(2, 3)))


class Padded(nn.Module):
    """2-D convolutions with other paddings than zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular")
        self.conv1 = nn.Conv2d(8, 8, 3, padding="same", padding_mode="reflect")
        self.head = nn.Linear(8, CLASSES)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = torch.tanh(self.conv1(torch.tanh(self.conv0(input_ids))))
        return self.head(x.mean(dim=(2, 3)))


class OneDimension(nn.Module):
    """1-D convolutions: strided, and 1 wide."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv1d(4, 8, 3, stride=2)
        self.conv1 = nn.Conv1d(8, 8, 1, bias=False)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv1(torch.tanh(self.conv0(input_ids)))).mean(dim=2))


class ThreeDimensions(nn.Module):
    """3-D convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv3d(2, 8, 3, padding=1)
        self.conv1 = nn.Conv3d(8, 8, 1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = torch.tanh(self.conv1(torch.tanh(self.conv0(input_ids))))
        return self.head(x.mean(dim=(2, 3, 4)))

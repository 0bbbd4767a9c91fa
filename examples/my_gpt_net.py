"""A home-made GPT-2, as people write it for themselves: ``nn.Linear``, separate q, k, v, names of its own."""

import math

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, width, n_heads, positions):
        super().__init__()
        self.n_heads, self.head_dim = n_heads, width // n_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.register_buffer("mask", torch.ones(positions, positions).tril().view(1, 1, positions, positions))

    def forward(self, x):
        batch, time, width = x.shape
        q, k, v = (project(x).view(batch, time, self.n_heads, self.head_dim).transpose(1, 2)
                   for project in (self.query, self.key, self.value))
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
        scores = scores.masked_fill(self.mask[:, :, :time, :time] == 0, float("-inf"))
        mixed = F.softmax(scores, dim=-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(batch, time, width))


class Block(nn.Module):
    def __init__(self, width, n_heads, positions):
        super().__init__()
        self.ln1 = nn.LayerNorm(width)
        self.attn = Attention(width, n_heads, positions)
        self.ln2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        x = x + self.attn(self.ln1(x))
        return x + self.down(F.gelu(self.up(self.ln2(x)), approximate="tanh"))


class MyGPT(nn.Module):
    """``forward(ids)``: logits [batch, time, vocabulary] for ids [batch, time]. The head is the embedding's weight."""

    def __init__(self, vocabulary=50257, positions=1024, width=768, layers=12, n_heads=12):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(positions, width)
        self.drop = nn.Dropout(0.1)
        self.blocks = nn.ModuleList([Block(width, n_heads, positions) for _ in range(layers)])
        self.ln_out = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.drop(self.tokens(ids) + self.places(torch.arange(ids.shape[1])))
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_out(x))

"""The models of benchmarks in PyTorch's own modules: GPT-2 without biases, our block, and an LSTM with a tied table."""

from typing import Any, NamedTuple


class Sizes(NamedTuple):
  """Of a model and of its batches."""

  vocab_size: int
  batch_size: int
  sequence_length: int
  dim: int
  num_layers: int
  num_heads: int = 0  # 0: an LSTM
  dropout: float = 0.0  # of GPT-2: embeddings, attention weights and both branches' outputs


def decay_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
  """Parameters as AdamW takes them: vectors don't decay."""
  groups = {True: weight_decay, False: 0.0}
  return [{'params': [p for p in model.parameters() if (p.dim() > 1) is wide], 'weight_decay': decay} for wide, decay in groups.items()]


def build(sizes: Sizes, our_block: bool = False) -> Any:
  """GPT-2 without biases (tanh GELU, learned positions, tied table), our block, or an LSTM with a tied table.

  The model takes ids, [B, T], and gives logits, [B, T, V].
  """
  import torch
  from torch import nn

  s = sizes

  def norm(dim: int) -> Any:
    return nn.RMSNorm(dim, eps=1e-5) if our_block else nn.LayerNorm(dim, bias=False)

  class SquaredReLU(nn.Module):
    def forward(self, x: Any) -> Any:
      return nn.functional.relu(x).square()

  class Block(nn.Module):
    def __init__(self) -> None:
      super().__init__()
      self.before_attention, self.before_mlp = norm(s.dim), norm(s.dim)
      self.qkv, self.out = nn.Linear(s.dim, 3 * s.dim, bias=False), nn.Linear(s.dim, s.dim, bias=False)
      activation = SquaredReLU() if our_block else nn.GELU('tanh')
      self.drop = nn.Dropout(s.dropout)
      self.mlp = nn.Sequential(nn.Linear(s.dim, 4 * s.dim, bias=False), activation, nn.Linear(4 * s.dim, s.dim, bias=False))
      if our_block:
        head_dim = s.dim // s.num_heads
        self.query_norm, self.key_norm = norm(head_dim), norm(head_dim)
        angles = torch.outer(torch.arange(s.sequence_length), 10_000.0 ** (-torch.arange(0, head_dim, 2) / head_dim))
        self.register_buffer('cos', angles.cos())
        self.register_buffer('sin', angles.sin())

    def rotate(self, x: Any) -> Any:
      one, other = x.chunk(2, dim=-1)
      return torch.cat([one * self.cos - other * self.sin, other * self.cos + one * self.sin], dim=-1)

    def forward(self, x: Any) -> Any:
      batch, time, dim = x.shape
      q, k, v = (part.view(batch, time, s.num_heads, -1).transpose(1, 2) for part in self.qkv(self.before_attention(x)).split(dim, dim=2))
      if our_block:
        q, k = self.rotate(self.query_norm(q)), self.rotate(self.key_norm(k))
      dropped = s.dropout if self.training else 0.0
      mixed = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropped, is_causal=True)
      x = x + self.drop(self.out(mixed.transpose(1, 2).reshape(batch, time, dim)))
      return x + self.drop(self.mlp(self.before_mlp(x)))

  class GPT(nn.Module):
    def __init__(self) -> None:
      super().__init__()
      self.token = nn.Embedding(s.vocab_size, s.dim)
      if our_block:
        self.unembedding = nn.Linear(s.dim, s.vocab_size, bias=False)
      else:
        self.position, self.drop = nn.Embedding(s.sequence_length, s.dim), nn.Dropout(s.dropout)
      self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(s.num_layers))), norm(s.dim)
      for param in self.parameters():
        if param.dim() > 1:
          nn.init.normal_(param, 0.0, 0.02)

    def forward(self, ids: Any) -> Any:
      if our_block:
        return self.unembedding(self.norm(self.blocks(self.token(ids))))
      x = self.drop(self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device)))
      return self.norm(self.blocks(x)) @ self.token.weight.T

  class Recurrent(nn.Module):
    def __init__(self) -> None:
      super().__init__()
      self.token, self.lstm = nn.Embedding(s.vocab_size, s.dim), nn.LSTM(s.dim, s.dim, s.num_layers, batch_first=True)

    def forward(self, ids: Any) -> Any:
      return self.lstm(self.token(ids))[0] @ self.token.weight.T

  return GPT() if s.num_heads else Recurrent()

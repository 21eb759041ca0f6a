"""PyTorch's side of `gpu.py --peers`, which calls it: the same models' training steps, and Hugging Face `generate`, on one GPU.

  python benchmarks/gpu_peers.py '{"device": "cuda", "repeats": 5, "turn_s": 1.0, "models": {"lstm": [257, 128, 128, 1024, 2, 0, 0.0]},
    "batches": [], "new_tokens": 128, "temperature": 0.8}'

Models are `torch_models.Sizes`. A step is forward, backward, a clip of the gradient by its global norm and fused AdamW, in bfloat16 by
autocast, with `scaled_dot_product_attention`; Transformers are compiled by `torch.compile`, the LSTM is cuDNN's own. Hugging Face draws
with GPT-2's sizes in bfloat16, a token at a time, with its cache. Prints a line of JSON for each measurement. On "cpu" nothing is compiled.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch_models

LR, BETAS, WEIGHT_DECAY, CLIP_NORM = 1e-3, (0.9, 0.95), 0.1, 1.0
PROMPT_TOKENS = 8


def main(argv: Sequence[str]) -> None:
  asked = json.loads(argv[1])
  torch.set_float32_matmul_precision('high')  # TF32 where autocast leaves float32
  models = {name: torch_models.Sizes(*sizes) for name, sizes in asked['models'].items()}
  for name, sizes in models.items():
    tell(part='training', model=name, **training(sizes, asked))
  for batch in asked['batches'] if 'gpt2_124m' in models else ():
    tell(part='generation', batch=batch, tokens_per_s=generation(models['gpt2_124m'], batch, asked))


def tell(**found: Any) -> None:
  print(json.dumps(found), flush=True)


def training(sizes: torch_models.Sizes, asked: dict[str, Any]) -> dict[str, Any]:
  """Milliseconds a step, by turn, and what went before."""
  device, on_gpu = asked['device'], asked['device'] != 'cpu'
  torch.manual_seed(0)
  model = torch_models.build(sizes).to(device)
  run = torch.compile(model) if on_gpu and sizes.num_heads else model
  optimizer = torch.optim.AdamW(torch_models.decay_groups(model, WEIGHT_DECAY), lr=LR, betas=BETAS, fused=True)
  ids = torch.randint(0, 256, (sizes.batch_size, sizes.sequence_length + 1), device=device)

  def take() -> Any:
    with torch.autocast(device, torch.bfloat16, enabled=on_gpu):  # CPUs without AVX-512 have no LSTM in bfloat16
      logits = run(ids[:, :-1])
      loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    return loss

  first_s = seconds(take, 1)
  if on_gpu:
    torch.cuda.reset_peak_memory_stats()
  seconds(take, 3)
  count = max(1, round(asked['turn_s'] / (seconds(take, 3) / 3)))
  ms = [seconds(take, count) / count * 1e3 for _ in range(asked['repeats'])]
  how = f'dropout {sizes.dropout}, ' if sizes.dropout else ''
  way = f'PyTorch {torch.__version__}, {how}{"compiled" if sizes.num_heads else "cuDNN"}'
  return {'way': way, 'ms': ms, 'first_s': first_s, 'gib': torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0}


def seconds(take: Callable[[], Any], count: int) -> float:
  began = time.perf_counter()
  for _ in range(count):
    loss = take()
  assert loss.isfinite().item()  # which waits for the device
  return time.perf_counter() - began


def generation(sizes: torch_models.Sizes, batch: int, asked: dict[str, Any]) -> list[float]:
  """Tokens a second, by turn."""
  import transformers

  transformers.logging.set_verbosity_error()
  no_special_tokens = dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id'))
  config = transformers.GPT2Config(
    n_layer=sizes.num_layers, n_embd=sizes.dim, n_head=sizes.num_heads, vocab_size=sizes.vocab_size, n_positions=sizes.sequence_length,
    **no_special_tokens,
  )  # fmt: skip
  model = transformers.GPT2LMHeadModel(config).eval().to(asked['device'], torch.bfloat16)
  how = {'do_sample': True, 'temperature': asked['temperature'], 'top_k': 0, 'pad_token_id': 0}
  speeds = []
  for turn in range(-1, asked['repeats']):  # the first warms up
    torch.manual_seed(turn + 1)
    ids = torch.randint(0, 256, (batch, PROMPT_TOKENS), device=asked['device'])
    began = time.perf_counter()
    with torch.inference_mode():
      made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=asked['new_tokens'], **how)
    assert len(made.tolist()[0]) == PROMPT_TOKENS + asked['new_tokens']
    speeds.append(batch * asked['new_tokens'] / (time.perf_counter() - began))
  return speeds[1:]


if __name__ == '__main__':
  main(sys.argv)

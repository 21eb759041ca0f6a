"""PyTorch's side of `gpu.py --peers`: the same models' training steps, and Hugging Face `generate`, on one GPU.

  python benchmarks/gpu_peers.py [--models gpt2_124m nanogpt_10m lstm] [--repeats=5]

A step is forward, backward, a clip of the gradient by its global norm and fused AdamW, in bfloat16 by autocast, with
`scaled_dot_product_attention`; Transformers are compiled by `torch.compile` (the LSTM is cuDNN's own). Hugging Face draws with GPT-2's
weights in bfloat16, a token at a time, with its cache. Prints a line of JSON for each measurement. --dry_run: tiny sizes, on the CPU.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch_models

LR, BETAS, WEIGHT_DECAY, CLIP_NORM = 1e-3, (0.9, 0.95), 0.1, 1.0
TURN_S, TEMPERATURE = 1.0, 0.8
SIZES = {
  'gpt2_124m': torch_models.Sizes(50_304, 32, 1024, 768, 12, 12),
  'nanogpt_10m': torch_models.Sizes(257, 64, 256, 384, 6, 6, dropout=0.2),
  'lstm': torch_models.Sizes(257, 128, 128, 1024, 2),
}
DRY_SIZES = {
  'gpt2_124m': torch_models.Sizes(257, 2, 64, 64, 1, 2),
  'nanogpt_10m': torch_models.Sizes(257, 2, 64, 32, 1, 2, dropout=0.2),
  'lstm': torch_models.Sizes(257, 4, 16, 32, 2),
}
NEW_TOKENS, BATCHES, DRY_BATCHES = 128, (1, 16, 256), (1, 3)


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--models', nargs='+', default=list(SIZES), choices=list(SIZES))
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--batches', type=int, nargs='*', help='of generation')
  parser.add_argument('--dry_run', action='store_true', help='tiny sizes')
  args = parser.parse_args(argv)
  torch.set_float32_matmul_precision('high')  # TF32 where autocast leaves float32
  for name in args.models:
    for way, sizes in ways(name, args.dry_run).items():
      tell(part='training', model=name, way=f'PyTorch {torch.__version__}, {way}', **training(name, sizes, args.repeats, args.dry_run))
  if 'gpt2_124m' in args.models:
    for batch, speeds in generation(args.repeats, args.dry_run, args.batches):
      tell(part='generation', model='gpt2_124m', batch=batch, tokens_per_s=speeds)


def tell(**found: Any) -> None:
  print(json.dumps(found), flush=True)


def ways(name: str, dry_run: bool) -> dict[str, torch_models.Sizes]:
  sizes = (DRY_SIZES if dry_run else SIZES)[name]
  how = 'compiled' if sizes.num_heads else 'cuDNN'
  return {f'dropout {sizes.dropout}, {how}' if sizes.dropout else how: sizes}


def training(name: str, sizes: torch_models.Sizes, repeats: int, dry_run: bool) -> dict[str, Any]:
  """Milliseconds a step, by turn, and what went before."""
  device = 'cpu' if dry_run else 'cuda'
  torch.manual_seed(0)
  model = torch_models.build(sizes).to(device)
  run = model if dry_run or not sizes.num_heads else torch.compile(model)
  decays = [p for p in model.parameters() if p.dim() > 1]
  others = [p for p in model.parameters() if p.dim() <= 1]
  groups = [{'params': decays, 'weight_decay': WEIGHT_DECAY}, {'params': others, 'weight_decay': 0.0}]
  optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)
  ids = torch.randint(0, 256, (sizes.batch_size, sizes.sequence_length + 1), device=device)

  def take() -> Any:
    with torch.autocast(device, torch.bfloat16):
      logits = run(ids[:, :-1])
      loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    return loss

  began = time.perf_counter()
  take().item()
  compile_s = time.perf_counter() - began
  if not dry_run:
    torch.cuda.reset_peak_memory_stats()
  seconds(take, 3)
  count = max(1, round((0.0 if dry_run else TURN_S) / (seconds(take, 3) / 3)))
  ms = [seconds(take, count) / count * 1e3 for _ in range(repeats)]
  gib = 0.0 if dry_run else torch.cuda.max_memory_allocated() / 2**30
  return {'rows': sizes.batch_size, 'length': sizes.sequence_length, 'ms': ms, 'compile_s': compile_s, 'gib': gib}


def seconds(take: Callable[[], Any], count: int) -> float:
  began = time.perf_counter()
  for _ in range(count):
    loss = take()
  assert loss.isfinite().item()  # which waits for the device
  return time.perf_counter() - began


def generation(repeats: int, dry_run: bool, batches: Sequence[int] | None) -> Iterator[tuple[int, list[float]]]:
  if batches is not None and not batches:
    return
  import transformers

  transformers.logging.set_verbosity_error()
  s, device = (DRY_SIZES if dry_run else SIZES)['gpt2_124m'], 'cpu' if dry_run else 'cuda'
  no_special_tokens = dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id'))
  sizes = {'n_layer': s.num_layers, 'n_embd': s.dim, 'n_head': s.num_heads, 'vocab_size': s.vocab_size, 'n_positions': s.sequence_length}
  model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **no_special_tokens)).eval().to(device, torch.bfloat16)
  new_tokens = 8 if dry_run else NEW_TOKENS
  for batch in (DRY_BATCHES if dry_run else BATCHES) if batches is None else batches:
    speeds = []
    for turn in range(-1, repeats):
      torch.manual_seed(turn + 1)
      ids = torch.randint(0, 256, (batch, 8), device=device)
      began = time.perf_counter()
      with torch.inference_mode():
        how = {'do_sample': True, 'temperature': TEMPERATURE, 'top_k': 0, 'pad_token_id': 0}
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **how)
      assert len(made.tolist()[0]) == 8 + new_tokens
      if turn >= 0:  # the first warms up
        speeds.append(batch * new_tokens / (time.perf_counter() - began))
    yield batch, speeds


if __name__ == '__main__':
  main()

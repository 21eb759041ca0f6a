"""nanoGPT's character model for a GPU, with its published settings: 10.65 M parameters, 6 layers, 384 wide.

  python train.py --config=configs/tiny_shakespeare_nanogpt_gpu.py --workdir=runs/nanogpt_gpu

It overfits, as the original does: the best checkpoint by val loss is kept beside the
latest, and sample.py takes the best. Score: not measured here, for want of a GPU
(nanoGPT's README says 1.4697 nats). Without the web, give the text yourself:
--config.data.path=tinyshakespeare.txt is split alike.
"""

from configs import tiny_shakespeare_nanogpt_cpu
from textgen_jax import experiment


def get_config() -> experiment.Experiment:
  config = tiny_shakespeare_nanogpt_cpu.get_config()
  config.model.dim, config.model.num_layers, config.model.num_heads = 384, 6, 6
  config.model.dropout = 0.2
  config.training.num_steps = 5000
  config.training.batch_size, config.training.sequence_length = 64, 256
  config.training.eval_every_steps = config.training.checkpoint_every_steps = 250
  return config

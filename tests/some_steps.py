"Train some steps in float64 and write down everything: `[torchrun ...] some_steps.py OUT STEPS BATCH MODEL_JSON [PARTS]`. Run by test_processes.py."
import json, sys
import torch

from emorl.core import set_seed
from emorl.data.scenes import batches
from emorl.data.tetrominoes import Tetrominoes
from emorl.models.slot_model import build_model
from emorl.train import TrainConfig, idles, make_accelerator, planned, step_noise, train_step

small = dict(slot_size=8, encoder=dict(widths=[8, 8], kernels=[5, 3], strides=[2, 2]), decoder_options=dict(widths=[8], kernels=[3, 3], paddings=[1, 1]), gain=1.)

def main(out, num_steps, batch, shape, parts=1):
    torch.set_default_dtype(torch.float64); torch.set_num_threads(1); set_seed(0)
    shape = json.loads(shape)
    curriculum = shape.pop('refinements', None)
    model = build_model(small | shape)
    m, config = model.config, TrainConfig(num_steps=int(num_steps), batch_size=int(batch), accumulate=int(parts), warmup=2, lr=1e-3, refinements=curriculum or ((0, model.config.num_refinements),))
    accelerator = make_accelerator(idle=idles(m, config))
    rank, world = accelerator.process_index, accelerator.num_processes
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], config.lr)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    data, lines, seen = batches(Tetrominoes(40), config.batch_size, 0, 0, rank, world), [], []
    for step in range(config.num_steps):
        scenes = next(data)
        seen.append(torch.from_numpy(scenes.image).double().flatten(1) @ torch.arange(1., 3*35*35 + 1))
        noise = step_noise(0, step, config.batch_size, m.num_draws(None, planned(step, config.refinements)), m.num_slots, m.slot_size, rank, world)
        log = train_step(wrapped, optimizer, scenes.images.double(), step, config, noise, accelerator)
        lines.append(log | {'gradient': sum((p.grad**2).sum().item() for p in model.parameters() if p.grad is not None)**.5})
    state = {k: v for k, v in model.state_dict().items()}
    torch.save({'lines': lines, 'state': state, 'seen': torch.stack(seen)}, f'{out}-{rank}.pt')
    accelerator.end_training()

if __name__ == '__main__': main(*sys.argv[1:])

"""One process's share of the loss at a batch of 131,072, its peers made up: the peak of its memory."""

import subprocess
import sys

from measure import write_result

SHARE = """
import sys
import torch, torch.distributed as dist, torch.nn.functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from evaclip.objectives import columns
from evaclip.objectives.columns import Exchange
from evaclip.objectives.contrastive import contrastive_loss

ranks, batch, dim, ring = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "ring"
dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())  # collectives that do nothing

class Repeated(columns.Gathered):
    '''As if the other processes had the same captions.'''
    def wait(self):
        gathered = super().wait()
        if self.rows is not None:
            gathered.copy_(self.rows.expand_as(gathered))
            self.rows = None
        return gathered
    def __init__(self, rows, group):
        self.rows = rows.detach()
        super().__init__(rows, group)

columns.Gathered = Repeated
import evaclip.objectives.contrastive as contrastive
contrastive.Gathered = Repeated
pass_on = columns._passed_on
columns._passed_on = lambda tensors, group: ([t.clone() for t in tensors], [])

local = batch // ranks
generator = torch.Generator().manual_seed(0)
image, text = (F.normalize(torch.randn(n, dim, generator=generator), dim=1) for n in (local, local))
inputs = [t.requires_grad_() for t in (image, text, torch.tensor([50.0]))]
exchange = Exchange(group=dist.group.WORLD, ring=ring)
contrastive_loss(*[t[:8].detach().requires_grad_() for t in inputs], exchange=exchange)[0].backward()

def megabytes(name):
    return int(open('/proc/self/status').read().split(name + ':')[1].split()[0]) / 1000 * 1.024
open('/proc/self/clear_refs', 'w').write('5')
before = megabytes('VmRSS')
contrastive_loss(*inputs, exchange=exchange)[0].backward()
print(megabytes('VmHWM') - before)
"""


def main() -> None:
    """Memory by batch and by the way that captions travel."""
    rows = []
    for ranks, batch, dim, way in (
        (8, 32_768, 768, "gathered"),
        (8, 32_768, 768, "ring"),
        (64, 131_072, 768, "gathered"),
        (8, 131_072, 768, "gathered"),
        (8, 131_072, 768, "ring"),
    ):
        command = [sys.executable, "-c", SHARE, str(ranks), str(batch), str(dim), way]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        megabytes = float(done.stdout)
        matrix = batch // ranks * batch * 4 / 1e6
        rows.append([f"{batch:,}", str(dim), str(ranks), way, f"**{megabytes:,.0f}**", f"{matrix:,.0f}"])
    write_result(
        "loss_share",
        "One process's share of the contrastive loss, forward and backward, on the CPU",
        ["batch", "dim", "processes", "captions", "MB extra", "MB of its logits, never built"],
        rows,
        "The other processes are made up: their captions are copies, collectives do nothing. Extra memory is the rise "
        "of the process's peak beside its features, with their float32 gradients and the gathered captions in it; the "
        "target at 131,072 x 768 on 8 processes is 400 MB.",
    )


if __name__ == "__main__":
    main()

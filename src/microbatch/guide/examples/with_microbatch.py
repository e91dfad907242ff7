import torch
import torch.nn.functional as F

import microbatch as mb

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x, y = torch.randn(50, 20), torch.randint(0, 3, (50,))

accumulator = mb.Accumulator(model, optimizer, microbatch_size=16)  #: begin


def loss_fn(model, microbatch):  #: take
    x_m, y_m = microbatch
    return F.cross_entropy(model(x_m), y_m)  #: forward


accumulator.step((x, y), loss_fn)  #: backward step

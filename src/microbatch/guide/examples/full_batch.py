import torch
import torch.nn.functional as F

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x, y = torch.randn(50, 20), torch.randint(0, 3, (50,))

optimizer.zero_grad()  #: begin
loss = F.cross_entropy(model(x), y)  #: take forward
loss.backward()  #: backward
optimizer.step()  #: step

import torch
import torch.nn.functional as F

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x, y = torch.randn(50, 20), torch.randint(0, 3, (50,))

optimizer.zero_grad()  #: begin
for rows in range(0, len(x), 16):
    x_m, y_m = x[rows : rows + 16], y[rows : rows + 16]  #: take
    loss = F.cross_entropy(model(x_m), y_m, reduction="sum")  #: forward
    (loss / len(x)).backward()  #: backward
optimizer.step()  #: step

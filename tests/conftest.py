"""Settings of the whole suite."""

import torch

# The tensors of the tests are small: handing them to several threads costs more than it saves,
# and on a loaded machine a hundred times more.
torch.set_num_threads(1)

"""The CPU kernels under default devices and dispatch modes: nothing made there is kept for a later call."""

import pytest

from tests.kernels.cpu_checks import CPU, in_process

pytestmark = CPU

# Each way to be called, in a process of its own: a wrong address would end the process.
FIRST_CALLS = {
    "with torch.device": """
with torch.device("meta"):
    layer(x).sum().backward()
""",
    "set_default_device": """
torch.set_default_device("meta")
layer(x).sum().backward()
torch.set_default_device("cpu")
""",
    "FakeTensorMode": """
with FakeTensorMode(allow_non_fake_inputs=True):
    layer(x)
""",
    "FakeTensorMode in inference mode": """
with torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True):
    layer(x)
""",
    "inference_mode": """
with torch.inference_mode():
    layer(x)
""",
    "set_default_dtype": """
torch.set_default_dtype(torch.float16)
layer(x).sum().backward()
torch.set_default_dtype(torch.float32)
""",
    "FlopCounterMode": """
with FlopCounterMode(display=False):
    layer(x).sum().backward()
""",
}
CODE = """
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
import batchnorm as bn

torch.manual_seed(0)
x = torch.randn({shape}, requires_grad=True)
grad = torch.randn({shape})
layer = bn.BatchNorm1d({channels}, activation={activation!r}, channel_dim={channel_dim})
new = bn.BatchNorm1d({channels}, activation={activation!r}, channel_dim={channel_dim})
{first_call}
layer.load_state_dict(new.state_dict())
layer.zero_grad()
x.grad = None
y = layer(x)
y.backward(grad)
got = (y, x.grad, layer.weight.grad, layer.running_mean, layer.running_var)
x64 = x.detach().double().requires_grad_()
wanted, mean, var = bn.batch_norm(
    x64, new.weight.double(), new.bias.double(), new.running_mean.double(), new.running_var.double(),
    activation={activation!r}, channel_dim={channel_dim},
)
wanted.backward(grad.double())
torch.testing.assert_close(y.double(), wanted, rtol=0, atol=1e-4)
torch.testing.assert_close(x.grad.double(), x64.grad, rtol=0, atol=1e-4)
torch.testing.assert_close(layer.running_mean.double(), mean, rtol=0, atol=1e-5)
torch.testing.assert_close(layer.running_var.double(), var, rtol=0, atol=1e-4)
"""
LAYOUTS = {
    "slabs": ((16, 32, 900), 1, "relu"),
    "groups": ((64, 2048, 4), 1, None),
    "rows": ((512, 16, 64), -1, "gelu"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("first_call", FIRST_CALLS)
def test_a_first_call_under_a_mode_leaves_nothing_behind(first_call, layout):
    shape, channel_dim, activation = LAYOUTS[layout]
    in_process(
        CODE.format(
            shape=shape,
            channels=shape[channel_dim],
            channel_dim=channel_dim,
            activation=activation,
            first_call=FIRST_CALLS[first_call],
        )
    )

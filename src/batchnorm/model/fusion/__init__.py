"""Batch norm run together with the add and the activation after it, in models whose code stays as it is.

Which layers: the forward of every module is traced by itself (torch.fx, its submodules as leaves), and a
batch norm may wait where all that is done with its output is an activation, or an add and then an activation,
in the same function. `nn.Sequential`s are read off their neighbours, so they need no trace; one that ends in
a batch norm, as the branches of many residual blocks do, stands for it in the function that calls it.

How: such a layer returns a `Waiting` tensor, the promise of its output. The activation, or the add, that is
called with it reaches `__torch_function__`, which runs the layer together with it. Anything else gets the
plain output. So the model's own code runs, every time: nothing the trace saw is baked in (training mode,
shapes, flags, submodules that are replaced later), there is nothing to pickle, copy or compile but a class,
hooks of submodules run, an `nn.ReLU` shared by several places needs no care, and a wrong guess costs time,
not correctness. Forwards generated from the traced graph would save some microseconds and lose all of this.

A promise is made only to the function it was found in, for inputs that go by a kernel that fuses, and not
under torch.compile, torch.export or torch.func (compilers fuse by themselves), nor where a hook would see it.

Limits: a function that, by a flag changed after the trace, returns the output of a batch norm as it is,
returns a `Waiting`; it is a tensor to all of torch's functions, and its statistics move when it is first
used. A batch norm and an activation in two functions are fused where the first is the forward of a
`Sequential`; a function of the user's that returns a batch norm's output may be called by itself.
"""

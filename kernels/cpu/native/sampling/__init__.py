"""What the kernel `sample` is made of: `edgeinfer.sampling.sampler` in kernels, bit for bit."""

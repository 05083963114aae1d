"""Lower precisions of one network call in ONNX, chosen by what it does on the sampler's own trajectory. No torch.

A call is lowered once and then composed K times, so weights are stored once in the lower precision. The sampler's
state, the plan's arithmetic and the graph's inputs and outputs stay float32.
"""

"""The compiler behind `export_onnx`: from torch's graph with whole norms in it to a graph of standard operators.

Why a compiler and not a translation: how a GroupNorm is best written depends on the runtime, and what it can be
spared (a standardisation, an order of channels) depends on its neighbours. So torch's exporter leaves each norm as one
node (`norm`), passes over the graph give away what the neighbours can take (`fold`, `order`), and only then each norm
is written in the form that suits the target (`targets`, `lowerings`).
"""

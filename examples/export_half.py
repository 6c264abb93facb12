"""Export a converted network for a GPU in half precision, and check what the file loses.

    python examples/export_half.py [--provider cuda] [--smoke]

Weights, inputs and outputs are fp16 or bf16; the norms' statistics stay in fp32 inside the file, because squares of
fp16 numbers above 256 overflow. All operators are standard ones, so the CPU can check a file that is meant for a GPU.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import timm
import torch

import gnswap

TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main(arguments: list[str] | None = None) -> dict[str, tuple[int, float, bool]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50", help="a name that timm knows (resnet50)")
    parser.add_argument("--pretrained", action="store_true", help="fetch timm's weights")
    parser.add_argument("--target", choices=["cuda", "tensorrt"], default="cuda", help="which runtime (cuda)")
    parser.add_argument("--provider", choices=["cpu", "cuda", "tensorrt"], default="cpu", help="where to check (cpu)")
    parser.add_argument("--out", type=Path, help="where to keep the files")
    parser.add_argument("--smoke", action="store_true", help="a small network, fp32 and fp16: some seconds")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    name, size = ("test_resnet", 64) if options.smoke else (options.model, 224)
    network = gnswap.convert(timm.create_model(name, pretrained=options.pretrained).eval()).model
    x = torch.randn(2, 3, size, size)
    rows: dict[str, tuple[int, float, bool]] = {}
    everything = not options.smoke  # any height and width, other batches
    print(f"{'':8}{'megabytes':>12}{'error':>10}{'torch':>10}{'allowed':>10}  passed")
    with tempfile.TemporaryDirectory() as scratch:
        out = options.out or Path(scratch)
        for kind, dtype in TYPES.items():
            if options.smoke and kind == "bf16":
                continue
            file = out / f"{name}-{kind}.onnx"
            report = gnswap.export_onnx(network, file, x, target=options.target, dtype=dtype, dynamic_size=everything)
            # the truth is the network in fp64; torch's own error in the same type says what can be expected
            parity = gnswap.validate_onnx(
                file, network, x, provider=options.provider, more_shapes=everything, special_inputs=False
            )
            worst = max(parity.outputs, key=lambda row: row.error or 0.0)
            rows[kind] = (report.size, worst.error or 0.0, parity.passed)
            figures = "".join(f"{value:10.1e}" for value in (worst.error, worst.torch_error, worst.bound))
            print(f"{kind:8}{report.size / 1e6:12.1f}{figures}  {'yes' if parity.passed else 'NO'}")
    return rows


if __name__ == "__main__":
    main()

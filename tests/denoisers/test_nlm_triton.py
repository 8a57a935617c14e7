"""The Triton kernel of non-local means, without a GPU: in Triton's interpreter, and compiled."""

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton has no package for this machine")

INTERPRETED = """
import numpy as np
import torch
from skimage.restoration import denoise_nl_means
from deepred_pl.denoisers.nlm_triton import nl_means

generator = torch.Generator().manual_seed(0)
for channels, height, width, size, distance, sigma in [
    (1, 9, 40, 5, 2, 10), (3, 10, 13, 3, 1, 25), (1, 5, 4, 4, 3, 5)
]:
    ramp = torch.linspace(0.2, 0.7, width).expand(1, channels, height, width)
    x = ramp + sigma / 255 * torch.randn(ramp.shape, generator=generator)
    level = sigma / 255
    got = nl_means(x, size, distance, 0.6 * level, level)
    assert got.dtype == torch.float32 and got.shape == x.shape
    for channel, denoised in zip(x[0].double().numpy(), got[0].numpy()):
        want = denoise_nl_means(
            channel, size, distance, h=0.6 * level, sigma=level, fast_mode=True
        )
        np.testing.assert_allclose(denoised, want, atol=1e-5)
        assert abs(denoised - channel).max() > 0.2 * level
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from deepred_pl.denoisers import nlm_triton

types = {"padded": "*fp32", "denoised": "*fp32", "per_distance": "fp32", "expected": "fp32"}
constants = {"HALF": 2, "DISTANCE": 6, "ROWS": nlm_triton.ROWS, "COLUMNS": nlm_triton.COLUMNS}
names = nlm_triton.kernel.arg_names
signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
for architecture in (80, 90):
    triton.compile(
        ASTSource(nlm_triton.kernel, signature=signature, constexprs=constants),
        target=GPUTarget("cuda", architecture, 32),
        options=nlm_triton.OPTIONS,
    )
"""


def run(code, interpreted):
    """Run code in a process of its own, because Triton reads its variable when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpreted))}
    environment |= {"TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_equals_scikit_image_in_the_interpreter():
    run(INTERPRETED, interpreted=True)


def test_it_compiles_without_spilling_registers():
    report = run(COMPILED, interpreted=False)
    assert re.findall(r"for 'sm_(\d+)", report) == ["80", "90"]
    assert report.count("0 bytes spill stores, 0 bytes spill loads") == 2
    assert all(0 < int(n) <= 128 for n in re.findall(r"Used (\d+) registers", report))

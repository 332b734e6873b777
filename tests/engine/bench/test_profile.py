"""Kernels by kind."""

import json
import re
from pathlib import Path

import pytest
import torch

import affmae_kernels
from affmae_engine.bench.profile import _device_times, category_of, operation_kernels, profile_step, summarise


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("_own_kernel", "merging"),
        ("triton_poi_fused__to_copy_12", "copies and casts"),
        ("triton_poi_fused__to_copy_add_gelu_3", "normalisation and elementwise"),
        ("triton_red_fused_native_layer_norm_backward_1", "normalisation and elementwise"),
        ("triton_tem_fused_mm_4", "matrix products"),
        ("nvjet_hsh_256x128_64x4_2x1_v_bz_coopA_NTT", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "dense attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>", "dense attention"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("Memcpy DtoD (Device -> Device)", "copies and casts"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>", "copies and casts"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add>", "normalisation and elementwise"),
        ("void at::native::_scatter_gather_elementwise_kernel<128, 8>", "gather, scatter, sort"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp>", "reductions"),
        ("mystery", "other"),
    ],
)  # fmt: skip
def test_categories(name: str, category: str) -> None:
    assert category_of(name, {"_own_kernel": "merging"}) == category


def test_the_projects_kernels_are_known() -> None:
    own = operation_kernels()
    assert own["_column_sums_kernel"] == "sums of partial sums" and own["_points_main_kernel"] == "point attention"
    assert own["_merging_forward_kernel"] == "merging" and own["_norm_backward_kernel"] == "residual LayerNorm"


def test_no_two_of_the_projects_kernels_share_a_name() -> None:
    """A profile tells them by their names alone."""
    root = Path(next(iter(affmae_kernels.__path__)))
    names = [
        name
        for file in root.rglob("*.py")
        for name in re.findall(r"^def (_\w*kernel)\b", file.read_text("utf-8"), re.MULTILINE)
    ]
    assert len(names) > 20 and sorted(names) == sorted(set(names))


def test_sums_are_a_step() -> None:
    profile = summarise({"sgemm": (6.0, 4), "bmm": (3.0, 2), "mystery": (1.0, 1)}, {}, steps=2, top=1)
    assert profile.categories == {"matrix products": (4.5, 3.0), "other": (0.5, 0.5)}
    assert profile.total_ms == 5 and profile.kernels == [("matrix products", "sgemm", 3.0, 2.0)]


def test_a_step_on_a_cpu() -> None:
    left = torch.randn(64, 64)
    profile = profile_step(lambda: left @ left, torch.device("cpu"))
    assert profile.categories["matrix products"][0] > 0


def test_kernels_are_read_from_the_trace() -> None:
    """Annotations, which cover kernels, and what the host did are left out."""

    class Recorded:
        def export_chrome_trace(self, path: str) -> None:
            events = [
                {"cat": "kernel", "name": "k", "dur": 1500},
                {"cat": "kernel", "name": "k", "dur": 500},
                {"cat": "gpu_memcpy", "name": "Memcpy", "dur": 1000},
                {"cat": "gpu_user_annotation", "name": "ProfilerStep", "dur": 9000},
                {"cat": "cpu_op", "name": "aten::mm", "dur": 9000},
                {"name": "metadata"},
            ]
            Path(path).write_text(json.dumps({"traceEvents": events}))

    assert _device_times(Recorded()) == {"k": (2.0, 2), "Memcpy": (1.0, 1)}

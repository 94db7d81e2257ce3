import pytest
import torch

from mollm.errors import UsageError
from mollm.system import machine, precision

CPU = torch.device("cpu")


@pytest.fixture
def processor(monkeypatch, tmp_path):
    """Puts a processor of some vendor with some flags in the place of this machine's."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)

    def put(vendor, flags, key="flags"):
        path = tmp_path / "cpuinfo"
        path.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n{key}\t\t: fpu {flags}\n\n" * 2)
        monkeypatch.setattr(machine, "CPUINFO", path)

    return put


@pytest.mark.parametrize(
    ("vendor", "flags", "dtype", "words"),
    [
        ("GenuineIntel", "avx2", torch.float32, "no instructions"),
        ("GenuineIntel", "avx2 avx512f avx512bw", torch.float32, "no instructions"),
        ("GenuineIntel", "avx512f avx512_bf16", torch.float32, "without AMX"),
        ("GenuineIntel", "avx512_bf16 amx_bf16 amx_tile", torch.bfloat16, "faster"),
        ("AuthenticAMD", "avx512f avx512_bf16", torch.bfloat16, "faster"),
        ("AuthenticAMD", "avx2", torch.float32, "no instructions"),
    ],
)
def test_bfloat16_where_the_processor_is_faster_in_it(processor, vendor, flags, dtype, words):
    processor(vendor, flags)
    found = precision.compute_dtype(CPU)
    assert found.dtype == dtype
    assert words in found.reason
    assert precision.autocast(CPU)._enabled is (dtype == torch.bfloat16)


def test_arm_calls_its_flags_features(processor):
    processor("", "asimd bf16", key="Features")
    assert precision.compute_dtype(CPU).dtype == torch.bfloat16


def test_a_limit_on_onednn_is_heeded(processor, monkeypatch):
    processor("AuthenticAMD", "avx512f avx512_bf16")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx512_core")
    assert precision.compute_dtype(CPU).dtype == torch.float32
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False, raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    assert "oneDNN" in precision.compute_dtype(CPU).reason


def test_an_unknown_processor_computes_in_float32(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "none")
    assert precision.compute_dtype(CPU).dtype == torch.float32
    assert machine.device_name(CPU)


def test_a_setting_overrules_and_auto_leaves_it_to_the_block_around(processor):
    processor("GenuineIntel", "avx2")
    with precision.computing_in("bfloat16"):
        assert precision.compute_dtype(CPU).name == "bfloat16"
        with precision.computing_in("auto"):
            assert precision.compute_dtype(CPU).name == "bfloat16"
        with precision.computing_in("float32"):
            assert precision.compute_dtype(CPU).name == "float32"
    assert precision.compute_dtype(CPU).name == "float32"
    with (
        pytest.raises(UsageError, match=r"compute_dtype must be one of auto, .* but got 'fp8'"),
        precision.computing_in("fp8"),
    ):
        pass

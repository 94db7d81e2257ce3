import json
from types import SimpleNamespace

import pytest
import torch

from mollm.cli import main
from mollm.system import doctor
from mollm_ops import _extension, rows

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


@pytest.fixture
def without_extension(monkeypatch):
    monkeypatch.setattr(_extension, "extension", None)


def test_a_whole_machine_is_well(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for words in ("python", "torch", "instruction set", "in use", "OK", "Free disk space"):
        assert words in text
    assert "Everything works." in text


def test_json_holds_everything(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"][0]["device"] == "cpu"
    assert [check["name"] for check in found["checks"]][: len(doctor.SELF_TESTS)] == list(
        doctor.SELF_TESTS
    )
    assert all(kernel["inactive_reason"] is None for kernel in found["kernels"])
    assert all(disk["free_gib"] >= 0 for disk in found["disks"])


def test_a_missing_extension_is_told_with_the_way_out(capsys, without_extension):
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "NOT in use: the compiled extension is missing: install a C++ compiler" in text
    assert "Something does not work" in text


def test_a_missing_package_is_no_fault(monkeypatch):
    monkeypatch.setattr(doctor, "_PACKAGES", ("no-such-package",))
    found = doctor.diagnose()
    assert found.versions["no-such-package"] == "not installed"
    assert found.ok


@pytest.mark.parametrize(
    ("has_cuda", "capability", "words"),
    [
        (False, (9, 0), "built without CUDA"),
        (True, (7, 5), "at least 8.0, but is 7.5"),
        (True, (8, 0), None),
        (True, (9, 0), None),
    ],
)
def test_why_cuda_kernels_are_not_in_use(monkeypatch, has_cuda, capability, words):
    monkeypatch.setattr(_extension, "extension", SimpleNamespace(HAS_CUDA=has_cuda))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cuda, triton = doctor._kernels(GPU)
    assert (cuda.inactive_reason is None) if words is None else (words in cuda.inactive_reason)
    assert cuda.device == triton.device == "cuda:0"


def test_why_cuda_kernels_are_missing_altogether(without_extension):
    assert "extension is missing" in next(doctor._kernels(GPU)).inactive_reason


def test_why_triton_kernels_are_not_in_use(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "unset TRITON_INTERPRET" in doctor._no_triton()
    monkeypatch.setattr(rows, "HAS_TRITON", False)
    assert "pip install triton" in doctor._no_triton()


def test_a_wrong_result_and_an_exception_are_told(monkeypatch, capsys):
    def broken(device):
        raise RuntimeError("no kernel image\nis available")

    tests = {
        "wrong": (lambda device: 0.5, 1e-3),
        "not finite": (lambda device: float("nan"), 1e-3),
        "broken": (broken, 1e-3),
    }
    monkeypatch.setattr(doctor, "SELF_TESTS", tests)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "the relative error must be at most 0.001, but is 0.5" in text
    assert "but is nan" in text
    assert "RuntimeError: no kernel image is available" in text


@pytest.mark.parametrize("name", doctor.SELF_TESTS)
def test_plain_torch_passes_the_self_test_too(name, without_extension):
    error_of, tolerance = doctor.SELF_TESTS[name]
    assert doctor._verdict(error_of, tolerance, CPU) is None


@pytest.mark.gpu
def test_a_gpu_passes_the_self_test():
    found = doctor.diagnose()
    assert any(check.device == "cuda:0" for check in found.checks)
    assert not [check for check in found.checks if check.error]

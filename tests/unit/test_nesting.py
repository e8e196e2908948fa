"""Where machines can run machines of their own."""

import pytest

from pytest_microvm.errors import HostError, UsageError
from pytest_microvm.hypervisors import Accelerator
from pytest_microvm.hypervisors.nesting import check_nesting

TCG, KVM, HVF = (Accelerator(name, "", "microvm") for name in ("tcg", "kvm", "hvf"))


@pytest.fixture
def modules(tmp_path):
    """Return a function that makes a folder of modules with a parameter's value."""

    def make(module="", value=""):
        if module:
            folder = tmp_path / module / "parameters"
            folder.mkdir(parents=True)
            (folder / "nested").write_text(f"{value}\n")
        return tmp_path

    return make


def test_emulation_can_and_is_slow(modules):
    assert "emulated and slow" in check_nesting("x86_64", TCG, modules("kvm_intel", "N"))


@pytest.mark.parametrize(("module", "value"), [("kvm_intel", "Y"), ("kvm_amd", "1"), ("", "")])
def test_kvm_that_allows_it(modules, module, value):
    assert check_nesting("x86_64", KVM, modules(module, value)) == ""


@pytest.mark.parametrize(("module", "value"), [("kvm_intel", "N"), ("kvm_amd", "0")])
def test_kvm_that_does_not(modules, module, value):
    with pytest.raises(HostError, match="does not allow it") as caught:
        check_nesting("x86_64", KVM, modules(module, value))
    assert f"modprobe {module} nested=1" in caught.value.resolution


def test_another_architecture_and_another_hypervisor(modules):
    with pytest.raises(UsageError, match="not possible for aarch64"):
        check_nesting("aarch64", TCG, modules())
    with pytest.raises(HostError, match="not possible with hvf"):
        check_nesting("x86_64", HVF, modules())

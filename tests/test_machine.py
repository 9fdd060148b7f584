"""Checks of memory, folders and GPUs, on machines that the tests write to disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.machine import (
    Memory,
    check_memory,
    check_writable,
    gpus,
    gpus_by_a_child,
    memory,
    size,
    weight_bytes,
)

GIB = 1 << 30


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A machine with 16 GiB, 12 of them free, and no cgroup."""
    kib = {"MemTotal": 16, "MemAvailable": 12, "SwapTotal": 0, "SwapFree": 0}
    lines = [f"{name}: {value * GIB // 1024} kB" for name, value in kib.items()]
    write(tmp_path / "proc/meminfo", "\n".join(lines))
    write(tmp_path / "proc/self/cgroup", "0::/\n")
    return tmp_path


def test_without_a_limit_the_memory_is_that_of_the_machine(machine: Path) -> None:
    assert memory(machine) == Memory(16 * GIB, 12 * GIB, "on this machine")


def write_v2(folder: Path, limit: str, used: int, *, cache: int = 0, shared: int = 0) -> None:
    write(folder / "memory.max", limit)
    write(folder / "memory.current", str(used))
    write(folder / "memory.stat", f"file {cache}\nshmem {shared}\nslab_reclaimable 0\n")


def test_a_container_has_its_limit_less_what_the_kernel_cannot_reclaim(machine: Path) -> None:
    root = machine / "sys/fs/cgroup"
    # 4 of the 6 GiB in use are page cache, and 1 of those is shared memory.
    write_v2(root, f"{8 * GIB}\n", 6 * GIB, cache=4 * GIB, shared=GIB)
    found = memory(machine)
    assert (found.total_bytes, found.free_bytes) == (8 * GIB, 5 * GIB)
    assert found.where == "in this container (its limit is 8.0 GiB)"


def test_a_group_without_a_limit_limits_nothing(machine: Path) -> None:
    write_v2(machine / "sys/fs/cgroup", "max\n", 6 * GIB)
    assert memory(machine).where == "on this machine"


def test_the_tightest_of_nested_groups_counts(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "0::/slice/service\n")
    root = machine / "sys/fs/cgroup"
    write_v2(root / "slice", str(4 * GIB), GIB)
    write_v2(root / "slice/service", str(8 * GIB), GIB)
    assert memory(machine).free_bytes == 3 * GIB


def test_the_limit_of_a_cgroup_of_version_1(machine: Path) -> None:
    """In a container the path is the host's, but the mount is the group itself."""
    write(machine / "proc/self/cgroup", "5:cpu:/docker/1\n4:memory:/docker/1\n0::/docker/1\n")
    root = machine / "sys/fs/cgroup/memory"
    write(root / "memory.limit_in_bytes", str(2 * GIB))
    write(root / "memory.usage_in_bytes", str(GIB))
    write(root / "memory.stat", f"total_cache {GIB // 2}\ntotal_shmem 0\n")
    assert memory(machine).free_bytes == 3 * GIB // 2


def test_an_unlimited_group_of_version_1_limits_nothing(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "4:memory:/\n")
    root = machine / "sys/fs/cgroup/memory"
    write(root / "memory.limit_in_bytes", str(9223372036854771712))
    write(root / "memory.usage_in_bytes", str(GIB))
    write(root / "memory.stat", "")
    assert memory(machine).where == "on this machine"


SWAP = 8 * GIB


def with_swap(machine: Path, free: int = SWAP) -> Path:
    meminfo = machine / "proc/meminfo"
    swap = f"SwapTotal: {SWAP // 1024} kB\nSwapFree: {free // 1024} kB"
    lines = [line for line in meminfo.read_text().splitlines() if "Swap" not in line]
    meminfo.write_text("\n".join([*lines, swap]))
    return machine


def test_swap_counts_on_a_machine(machine: Path) -> None:
    assert memory(with_swap(machine)) == Memory(24 * GIB, 20 * GIB, "on this machine")


@pytest.mark.parametrize(("swap_max", "left"), [("max", 8), (str(3 * GIB), 2), ("0", 0)])
def test_swap_counts_as_far_as_the_cgroup_allows(machine: Path, swap_max: str, left: int) -> None:
    root = with_swap(machine) / "sys/fs/cgroup"
    write_v2(root, str(4 * GIB), GIB)
    write(root / "memory.swap.max", swap_max)
    write(root / "memory.swap.current", str(GIB if left == 2 else 0))
    assert memory(machine).free_bytes == (3 + left) * GIB


def test_swap_that_others_use_counts_as_total_but_not_as_free(machine: Path) -> None:
    """The total decides what can never fit, the free part what currently does not fit."""
    root = with_swap(machine, free=GIB) / "sys/fs/cgroup"
    assert memory(machine) == Memory(24 * GIB, 13 * GIB, "on this machine")
    write_v2(root, str(4 * GIB), GIB)
    write(root / "memory.swap.max", str(3 * GIB))
    write(root / "memory.swap.current", str(GIB))
    found = memory(machine)
    assert (found.total_bytes, found.free_bytes) == (7 * GIB, 4 * GIB)


def test_a_parent_without_swap_leaves_none_to_its_groups(machine: Path) -> None:
    write(with_swap(machine) / "proc/self/cgroup", "0::/slice/service\n")
    root = machine / "sys/fs/cgroup"
    for folder, swap_max in ((root / "slice", "0"), (root / "slice/service", "max")):
        write_v2(folder, "max", GIB)
        write(folder / "memory.swap.max", swap_max)
        write(folder / "memory.swap.current", "0")
    assert memory(machine) == Memory(16 * GIB, 12 * GIB, "on this machine")


@pytest.mark.parametrize(("both", "left"), [(1 << 62, 8), (5 * GIB, 3), (2 * GIB, 0)])
def test_swap_of_a_cgroup_of_version_1(machine: Path, both: int, left: int) -> None:
    """Its limit covers memory and swap together."""
    write(with_swap(machine) / "proc/self/cgroup", "4:memory:/\n")
    root = machine / "sys/fs/cgroup/memory"
    write(root / "memory.limit_in_bytes", str(2 * GIB))
    write(root / "memory.usage_in_bytes", str(GIB))
    write(root / "memory.memsw.limit_in_bytes", str(both))
    write(root / "memory.memsw.usage_in_bytes", str(GIB))
    write(root / "memory.stat", "")
    assert memory(machine).free_bytes == (1 + left) * GIB


def test_a_driver_that_does_not_answer_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.machine._GPU_TIMEOUT_S", 0.001)
    with pytest.raises(TimeoutError, match="ROLLOUT_DEVICE=cuda: the driver did not answer"):
        gpus_by_a_child("ROLLOUT_DEVICE=cuda")


def test_the_memory_of_this_machine_can_be_read() -> None:
    found = memory()
    assert 0 < found.free_bytes <= found.total_bytes


def test_what_fits_is_not_refused() -> None:
    check_memory("m", {"weights": 4 * GIB}, Memory(8 * GIB, 4 * GIB, "here"))


def test_a_need_above_the_total_memory_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"needs at least 10.0 GiB") as raised:
        check_memory(
            "ROLLOUT_MODEL big",
            {"weights": 9 * GIB, "KV cache": GIB},
            Memory(8 * GIB, 7 * GIB, "in this container (its limit is 8.0 GiB)"),
        )
    assert str(raised.value) == (
        "ROLLOUT_MODEL big needs at least 10.0 GiB of memory (weights 9.0 GiB, KV cache 1.0 GiB), "
        "but only 7.0 GiB of 8.0 GiB are free in this container (its limit is 8.0 GiB): give it "
        "more memory, or choose a smaller model"
    )


def test_a_need_above_the_free_memory_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match=r"1.0 GiB of 8.0 GiB are free here"):
        check_memory("m", {"weights": 4 * GIB}, Memory(8 * GIB, GIB, "here"))


def test_weights_are_counted_from_the_headers(tiny_checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    num_all = sum(parameter.numel() for parameter in model.parameters())
    num_linear = sum(p.numel() for name, p in model.named_parameters() if "_proj" in name)
    weights = weight_bytes(tiny_checkpoint)
    assert weights.bf16 == weights.stored == 2 * num_all
    assert weights.nf4 == 2 * (num_all - num_linear) + num_linear // 2


def test_truncated_files_are_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    content = (tiny_checkpoint / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"model.safetensors is not a complete safetensors file"):
        weight_bytes(tmp_path)


def test_an_unwritable_folder_is_named_with_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^TRAINER_RUNS_DIR: .*/file/runs is not writable"):
        check_writable("TRAINER_RUNS_DIR", tmp_path / "file" / "runs")


def test_a_missing_folder_is_created_and_left_empty(tmp_path: Path) -> None:
    check_writable("TRAINER_RUNS_DIR", tmp_path / "new" / "runs")
    assert list((tmp_path / "new" / "runs").iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("look", [gpus, gpus_by_a_child])
def test_without_a_gpu_the_setting_that_needs_one_is_named(look: object) -> None:
    assert callable(look)
    with pytest.raises(ValueError, match=r"^ROLLOUT_DEVICE=cuda: .*set cpu$"):
        look("ROLLOUT_DEVICE=cuda")


def test_sizes_are_printed_in_readable_units() -> None:
    assert (size(64 << 20), size(3 * GIB // 2)) == ("64 MiB", "1.5 GiB")

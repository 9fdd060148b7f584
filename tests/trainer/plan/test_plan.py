"""The memory planner: measured peaks, the code whose memory it counts, and what it proposes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from services.machine import weight_bytes
from services.rollout.preflight import adapter_bytes
from services.rollout.settings import RolloutSettings
from services.trainer.plan import choice, cli, memory
from services.trainer.plan.choice import Request, place
from services.trainer.plan.inputs import GIB, Gpu, Model, find_gpu, read_model
from services.trainer.plan.memory import Batch, replica_memory, trainer_memory
from services.trainer.policy.logprobs import _CHUNK_LOGITS
from services.trainer.policy.offload import _MAX_LEAVING
from services.trainer.policy.policy import _SCORE_POSITIONS
from services.trainer.policy.samples import Sample, group_indices
from services.trainer.policy.token_batch import PackedAttention, collate, make_trees, micro_batches
from services.trainer.run_config import parse_run_config
from services.trainer.settings import TrainerSettings
from shared.model_folder import linear_shapes
from shared.schemas import ServingMode

ROOT = Path(__file__).parents[3]
QWEN3_4B = {
    "model_type": "qwen3",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40960,
    "sliding_window": None,
}
QWEN3_8B = QWEN3_4B | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "tie_word_embeddings": False,
}


def model_of(folder: Path, config: dict[str, Any]) -> Model:
    return read_model(str(write_config(folder, config)))


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"


@pytest.fixture
def qwen3_4b(tmp_path: Path) -> Path:
    return write_config(tmp_path / "Qwen3-4B", QWEN3_4B)


# --- measured -----------------------------------------------------------------------------------

# `python -m benchmarks.policy_update --device cuda --shape 4b`, with what stands beside a row, on
# one H100 80GB, torch 2.11.0, rank 32; GiB of torch's allocator.
MEASURED = [
    # --scaling: one row at a time
    (Batch(1, 2, 512, 512), 1, False, 4.16),
    (Batch(1, 2, 2048, 2048), 1, False, 4.97),
    (Batch(1, 2, 4096, 4096), 1, False, 6.02),
    (Batch(1, 2, 8192, 8192), 1, False, 8.45),
    (Batch(1, 2, 16384, 16384), 1, False, 13.37),
    # --scaling: a group at once
    (Batch(1, 4, 1024, 256), 64 * 1280, False, 4.40),
    (Batch(1, 16, 1024, 256), 64 * 1280, False, 4.96),
    (Batch(1, 32, 1024, 256), 64 * 1280, False, 6.44),
    (Batch(1, 64, 1024, 256), 64 * 1280, False, 9.38),
    # --rows-no-sharing --offload 16384 8192
    (Batch(16, 1, 512, 512), 16384, False, 8.26),
    (Batch(16, 1, 512, 512), 16384, True, 5.92),
    (Batch(16, 1, 512, 512), 8192, True, 4.78),
    # --groups 8 --group-size 8 --prompt 1024 --completion 512 --offload 16384 5120
    (Batch(8, 8, 1024, 512), 16384, False, 8.29),
    (Batch(8, 8, 1024, 512), 16384, True, 5.88),
    (Batch(8, 8, 1024, 512), 5120, True, 4.38),
]


@pytest.mark.parametrize(("batch", "max_tokens", "offload", "gibibytes"), MEASURED)
def test_the_peak_of_an_update_is_the_measured_one(
    tmp_path: Path, batch: Batch, max_tokens: int, offload: bool, gibibytes: float
) -> None:
    predicted = trainer_memory(
        model_of(tmp_path, QWEN3_4B),
        batch,
        max_tokens=max_tokens,
        lora_rank=32,
        optimizer="adamw",
        load_in_4bit=True,
        offload=offload,
    )
    assert predicted.peak / GIB == pytest.approx(gibibytes, rel=0.01)


# `python -m benchmarks.memory --device cuda --shape 8b`, the same otherwise.
@pytest.mark.parametrize(
    ("batch", "offload", "gibibytes"),
    [
        (Batch(8, 8, 1024, 512), False, 13.98),
        (Batch(8, 8, 1024, 512), True, 10.12),
        (Batch(16, 1, 512, 512), False, 14.01),
        (Batch(2, 8, 512, 512), False, 10.93),
    ],
)
def test_the_peak_of_an_update_of_an_8b_model_is_the_measured_one(
    tmp_path: Path, batch: Batch, offload: bool, gibibytes: float
) -> None:
    predicted = trainer_memory(
        model_of(tmp_path, QWEN3_8B),
        batch,
        max_tokens=16384,
        lora_rank=32,
        optimizer="adamw",
        load_in_4bit=True,
        offload=offload,
    )
    assert predicted.peak / GIB == pytest.approx(gibibytes, rel=0.01)


# vLLM 0.26.0 on one H200, gpu_memory_utilization=0.5, max_num_seqs=256, adapters of rank 16.
@pytest.mark.parametrize(("dtype", "tokens"), [("fp8", 887_936), ("auto", 444_192)])
def test_the_kv_cache_is_the_measured_one(
    tmp_path: Path, dtype: memory.KvCacheDtype, tokens: int
) -> None:
    model = model_of(tmp_path, QWEN3_4B)
    predicted = replica_memory(model, lora_rank=16, max_num_seqs=256, serving_mode="lora")
    share = find_gpu("H200").usable_bytes // 2
    assert predicted.kv_tokens(share, dtype) == pytest.approx(tokens, rel=0.005)


# `python -m benchmarks.memory --device cuda --shape 8b --skip-updates`: vLLM 0.26.0 on one H100.
@pytest.mark.parametrize(("mode", "tokens"), [("lora", 325_984), ("merged", 144_704)])
def test_the_kv_cache_of_an_8b_model_is_the_measured_one(
    tmp_path: Path, mode: ServingMode, tokens: int
) -> None:
    model = model_of(tmp_path, QWEN3_8B)
    predicted = replica_memory(model, lora_rank=32, max_num_seqs=256, serving_mode=mode)
    share = find_gpu("H100").usable_bytes // 2
    assert predicted.kv_tokens(share, "fp8") == pytest.approx(tokens, rel=0.02)


# --- the code it counts -------------------------------------------------------------------------


def test_figures_of_other_files_are_what_they_are_there() -> None:
    rollout = RolloutSettings.model_fields
    assert memory.CHUNK_LOGITS == _CHUNK_LOGITS
    assert memory.SCORE_POSITIONS == _SCORE_POSITIONS
    assert memory.OFFLOADED_LEFT == _MAX_LEAVING + 1
    assert rollout["max_live_policies"].default == memory.MAX_LIVE_POLICIES
    assert rollout["gpu_memory_utilization"].default == choice.UTILIZATION
    assert rollout["max_num_seqs"].default == cli.MAX_NUM_SEQS
    for rank in memory.LORA_RANKS:
        for wanted in (rank - 1 or 1, rank):
            slot = RolloutSettings(model="m", max_lora_rank=wanted).lora_slot_rank
            assert slot == next(rank for rank in memory.LORA_RANKS if rank >= wanted)


def samples_of(batch: Batch) -> list[Sample]:
    one = Sample(
        prompt_token_ids=(5,) * batch.prompt,
        token_ids=(6,) * batch.completion,
        sampler_logprobs=(),
        staleness=(0,) * batch.completion,
        temperature=1.0,
        group=0,
        rewards=(1.0,),
        is_truncated=False,
    )
    size = batch.num_groups * batch.group_size
    return [replace(one, group=index // batch.group_size) for index in range(size)]


@given(
    st.builds(
        Batch,
        num_groups=st.integers(1, 4),
        group_size=st.integers(1, 9),
        prompt=st.integers(1, 40),
        completion=st.integers(2, 20),
    ),
    st.integers(1, 300),
)
def test_the_largest_micro_batch_is_the_one_the_trainer_cuts(batch: Batch, max_tokens: int) -> None:
    samples = samples_of(batch)
    trees = [
        [tree]
        for group in group_indices(samples)
        for tree in make_trees(
            samples, group, layout="packed", max_tokens=max_tokens, hidden_size=64
        )
    ]
    cut = list(micro_batches(trees, layout="packed", max_tokens=max_tokens))
    planned = memory.micro_batches(batch, max_tokens)
    assert {len(tree.indices) for part in cut for tree in part} == {p.tree_size for p in planned}
    if len(planned) > 1:  # trees of two sizes may meet in one
        return
    tensors = collate(samples, cut[0], layout="packed")
    assert isinstance(tensors.attention, PackedAttention)
    assert tensors.input_ids.numel() == planned[0].positions
    assert int(tensors.attention.cu_k[-1]) == planned[0].keys
    assert len(tensors.attention.cu_q) - 1 == planned[0].segments
    assert len(tensors.labels) == planned[0].tokens


def test_a_shape_takes_what_its_files_do(tiny_checkpoint: Path, tmp_path: Path) -> None:
    files = read_model(str(tiny_checkpoint))
    shape = model_of(tmp_path, json.loads((tiny_checkpoint / "config.json").read_text()))
    assert files.files
    assert not shape.files
    for field in ("stored", "bf16", "nf4"):
        ours, theirs = getattr(shape.weights, field), getattr(files.weights, field)
        assert ours == pytest.approx(theirs, rel=0.01)


def test_adapters_and_the_merging_copy_take_what_the_replica_says(tiny_checkpoint: Path) -> None:
    model, shapes = read_model(str(tiny_checkpoint)), linear_shapes(tiny_checkpoint)
    assert 2 * model.num_lora(8) == adapter_bytes(shapes, 8)
    merged = replica_memory(model, lora_rank=8, max_num_seqs=8, serving_mode="merged")
    assert (merged.copy, merged.slots) == (weight_bytes(tiny_checkpoint).linears, 0)
    slots = replica_memory(model, lora_rank=9, max_num_seqs=8, serving_mode="lora").slots
    assert slots == 3 * adapter_bytes(shapes, 16)


def test_4_bit_weights_have_a_byte_per_64_and_a_float_per_256_of_these(tmp_path: Path) -> None:
    model = model_of(tmp_path, QWEN3_4B)
    assert model.num_linear == 36 * (2 * 2560 * 4096 + 2 * 2560 * 1024 + 3 * 2560 * 9728)
    scales = model.num_linear // 64 + 4 * (model.num_linear // 64 // 256)
    assert model.nf4_bytes == model.num_linear // 2 + scales + 2 * 151936 * 2560


def test_8_bit_moments_take_a_quarter(tmp_path: Path) -> None:
    def moments(optimizer: memory.Optimizer) -> int:
        return trainer_memory(
            model_of(tmp_path, QWEN3_4B),
            Batch(2, 8, 512, 512),
            max_tokens=8192,
            lora_rank=32,
            optimizer=optimizer,
            load_in_4bit=True,
        ).optimizer

    assert moments("adamw_8bit") / moments("adamw") == pytest.approx(0.25, rel=0.02)


def test_the_planner_imports_no_torch(qwen3_4b: Path) -> None:
    script = """
import runpy, sys
sys.argv = ["trainer", "plan", *sys.argv[1:]]
try:
    runpy.run_module("services.trainer", run_name="__main__")
except SystemExit as end:
    assert end.code == 0, end.code
assert not {"torch", "transformers", "services.rollout"} & set(sys.modules)
"""
    options = ["--model", str(qwen3_4b), "--gpu", "H100", "--context", "4096"]
    run = subprocess.run(
        [sys.executable, "-c", script, *options],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("Qwen3-4B on H100 80GB (79.1 GiB usable) · context 4,096")


# --- the plan -----------------------------------------------------------------------------------


@given(
    config=st.sampled_from([QWEN3_4B, QWEN3_8B]),
    gibibytes=st.floats(4, 200),
    prompt=st.integers(1, 16384),
    completion=st.integers(1, 16384),
    group_size=st.integers(1, 64),
    rank=st.integers(1, 512),
    dtype=st.sampled_from(["fp8", "auto"]),
    mode=st.sampled_from(["lora", "merged"]),
)
def test_what_fits_is_within_the_gpu_and_holds_a_group(
    tmp_path_factory: pytest.TempPathFactory,
    config: dict[str, Any],
    gibibytes: float,
    prompt: int,
    completion: int,
    group_size: int,
    rank: int,
    dtype: memory.KvCacheDtype,
    mode: Any,
) -> None:
    gpu = Gpu("a GPU", int(gibibytes * GIB), None)
    request = Request(
        model=model_of(tmp_path_factory.mktemp("model"), config),
        gpu=gpu,
        batch=Batch(32, group_size, prompt, completion),
        lora_rank=rank,
        optimizer="adamw",
        load_in_4bit=True,
        offload=False,
        kv_cache_dtype=dtype,
        max_num_seqs=256,
        serving_mode=mode,
        max_tokens=None,
    )
    for num_gpus in (1, 2):
        placed = place(request, num_gpus)
        assert placed.max_tokens >= request.batch.context
        if placed.missing_bytes:
            larger = replace(gpu, usable_bytes=gpu.usable_bytes + placed.missing_bytes + 2 * GIB)
            if num_gpus == 2:
                assert not place(replace(request, gpu=larger), 2).missing_bytes
            continue
        on_the_replicas = placed.share + placed.replica.beside
        on_the_trainers = placed.trainer.total
        if num_gpus == 1:
            assert on_the_replicas + on_the_trainers <= gpu.usable_bytes
        else:
            assert max(on_the_replicas, on_the_trainers) <= gpu.usable_bytes
        assert placed.num_groups >= 1
        assert placed.replica.kv_tokens(placed.share, dtype) >= request.batch.context


def plan_of(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, Any]]:
    code = cli.main([*options, "--json"])
    record = json.loads(capsys.readouterr().out)
    assert code == (0 if record["fits"] else 1)
    return code, record


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--serving-mode", "merged"],
        ["--no-load-in-4bit", "--optimizer", "adamw_8bit", "--offload-activations"],
    ],
)
def test_services_and_runs_take_the_settings(
    capsys: pytest.CaptureFixture[str], qwen3_4b: Path, more: list[str]
) -> None:
    options = ["--model", str(qwen3_4b), "--gpu", "H100", "--context", "4096", *more]
    _, plan = plan_of(capsys, *options)
    settings: dict[str, dict[str, str]] = {"ROLLOUT": {}, "TRAINER": {}}
    for name, value in plan["environment"].items():
        service, _, field = name.partition("_")
        settings[service][field.lower()] = value
    rollout = RolloutSettings.model_validate({"model": "m", **settings["ROLLOUT"]})
    trainer = TrainerSettings.model_validate({"model": "m", **settings["TRAINER"]})
    assert trainer.load_in_4bit == (rollout.base == "nf4-exact")
    demo = yaml.safe_load((ROOT / "examples/demo/run.yaml").read_text())
    run = parse_run_config(yaml.safe_dump(demo | plan["run_config"]))
    assert run.lora.rank == rollout.max_lora_rank == 32
    assert rollout.max_model_len == 4096
    assert run.in_flight == ("continue" if rollout.serving_mode == "merged" else "finish")

    assert cli.main(options) == 0
    text = capsys.readouterr().out
    for name, value in plan["environment"].items():
        assert f"  {name}={value}\n" in text
    assert f"\n{plan['verdict']}\n" in text
    assert f"{plan['trainer']['peak'] / GIB:.2f} GiB  as torch counts it" in text


def test_a_whole_group_has_room_in_a_micro_batch_where_memory_allows(
    capsys: pytest.CaptureFixture[str], qwen3_4b: Path
) -> None:
    options = ["--model", str(qwen3_4b), "--context", "8192", "--completion", "512"]
    _, wide = plan_of(capsys, *options, "--gpu", "H100")
    _, narrow = plan_of(capsys, *options, "--gpu", "RTX 4090")
    assert wide["run_config"]["max_tokens_per_micro_batch"] == 16384
    assert 7680 + 8 * 511 <= narrow["run_config"]["max_tokens_per_micro_batch"] < 16384


@pytest.mark.parametrize(
    ("config", "options", "verdict"),
    [
        (
            QWEN3_4B,
            ["--gpu", "L4", "--context", "16384", "--completion", "4096", "--lora-rank", "64"],
            "fits on two GPUs, .* on one they lack \\d+\\.\\d GiB: ",
        ),
        (
            QWEN3_8B,
            ["--gpu", "24", "--context", "4096"],
            "fits on two GPUs, .*: take a GPU with \\d+ GiB or more, or a smaller model$",
        ),
    ],
)
def test_what_needs_two_gpus_says_what_one_lacks(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    config: dict[str, Any],
    options: list[str],
    verdict: str,
) -> None:
    file = write_config(tmp_path, config)
    code, plan = plan_of(capsys, "--model", str(file), *options)
    assert (code, plan["num_gpus"], plan["missing_bytes"]) == (0, 2, 0)
    assert_matches(verdict, plan["verdict"])


NO_ROOM = "does not fit, even with a GPU for each: the "


@pytest.mark.parametrize(
    ("options", "verdict", "mended"),
    [
        (
            "--gpu 20 --context 16384 --completion 8192",
            r"replica lacks \d+\.\d GiB; set ROLLOUT_KV_CACHE_DTYPE=fp8 \(it needs .* 8.9\)$",
            "--kv-cache-dtype fp8",
        ),
        (
            "--gpu 16 --context 4096 --serving-mode merged",
            r"replica lacks \d+\.\d GiB; set ROLLOUT_SERVING_MODE=lora$",
            "--serving-mode lora",
        ),
        (
            "--gpu L4 --context 8192 --max-tokens-per-micro-batch 90000",
            r"trainer lacks \d+\.\d GiB; lower max_tokens_per_micro_batch to 16384$",
            "--max-tokens-per-micro-batch 16384",
        ),
        (
            "--gpu L4 --context 40960 --completion 32768 --group-size 8",
            r"replica lacks \d+\.\d GiB; lower sampling.n to 4$",
            "--group-size 4",
        ),
        (
            "--gpu L4 --context 4096 --lora-rank 512",
            r"trainer lacks \d+\.\d GiB; set optimizer.name to adamw_8bit$",
            "--optimizer adamw_8bit",
        ),
        (
            "--gpu 18 --context 4096 --lora-rank 512 --optimizer adamw_8bit --kv-cache-dtype fp8",
            r"replica lacks \d+\.\d GiB; lower lora.rank to 320$",
            "--lora-rank 320",
        ),
        (
            "--gpu L4 --context 40960 --completion 40000 --group-size 16",
            r"replica lacks \d+\.\d GiB; shorten the context to 11,008 tokens, with completions "
            r"\(sampling.max_tokens\) of 10,048$",
            "--context 11008 --completion 10048",
        ),
        (
            "--gpu 10 --context 4096",
            r"replica lacks \d+\.\d GiB; take a GPU with \d+ GiB or more, or a smaller model$",
            "--gpu 16",
        ),
    ],
)
def test_what_does_not_fit_says_by_how_much_and_what_to_change(
    capsys: pytest.CaptureFixture[str],
    qwen3_4b: Path,
    options: str,
    verdict: str,
    mended: str,
) -> None:
    code, plan = plan_of(capsys, "--model", str(qwen3_4b), *options.split())
    assert code == 1
    assert plan["missing_bytes"] > 0
    assert_matches(NO_ROOM + verdict, plan["verdict"])
    assert plan_of(capsys, "--model", str(qwen3_4b), *options.split(), *mended.split())[0] == 0


def assert_matches(pattern: str, text: str) -> None:
    assert re.match(pattern, text), text


# --- GPUs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("H100", "H100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("nvidia a100-sxm4-40gb", "A100 40GB"),
        ("A100-80", "A100 80GB"),
        ("RTX4090", "RTX 4090 24GB"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090 24GB"),
        ("3090", "RTX 3090 24GB"),
        ("L40S", "L40S 48GB"),
        ("l4", "L4 24GB"),
        ("24", "a GPU of 24 GiB"),
        ("47.5 GiB", "a GPU of 47.5 GiB"),
    ],
)
def test_a_gpu_goes_by_its_name_or_its_size(text: str, name: str) -> None:
    assert find_gpu(text).name == name


def test_only_gpus_of_capability_8_9_plan_for_fp8(
    capsys: pytest.CaptureFixture[str], qwen3_4b: Path
) -> None:
    for gpu, dtype in (("H100", "fp8"), ("A100-80GB", "auto"), ("80", "auto")):
        options = ["--model", str(qwen3_4b), "--gpu", gpu, "--context", "4096"]
        _, plan = plan_of(capsys, *options)
        assert plan["environment"]["ROLLOUT_KV_CACHE_DTYPE"] == dtype
        tokens = plan["replica"]["kv_tokens"]
        assert tokens["fp8"] == pytest.approx(2 * tokens["auto"], rel=0.001)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--gpu", "H1000"], "--gpu H1000 is not known: give its GiB"),
        (["--gpu", "A100"], "--gpu A100 may be A100 40GB or A100 80GB: say which"),
        (["--gpu", "0"], "--gpu 0: name a GPU, or its GiB"),
        (["--context", "0"], "argument --context: '0' is no whole number above 0"),
        (["--context", "many"], "argument --context: 'many' is no whole number above 0"),
        (["--context", "50000"], "--context 50000: the longest of Qwen3-4B is 40960"),
        (["--completion", "4096"], "--completion 4096 leaves no room for a prompt"),
        (["--lora-rank", "513"], "--lora-rank 513: the largest is 512"),
        (
            ["--gpu", "A10G", "--kv-cache-dtype", "fp8"],
            "--kv-cache-dtype fp8: A10G 24GB has no FP8",
        ),
        (["--optimizer", "sgd"], "argument --optimizer: invalid choice: 'sgd'"),
        (["--contxt", "1"], "unrecognized arguments: --contxt 1"),
        (["--model", "/nowhere"], "--model /nowhere: no such folder"),
    ],
)
def test_a_bad_option_is_one_sentence(
    capsys: pytest.CaptureFixture[str], qwen3_4b: Path, options: list[str], sentence: str
) -> None:
    good = ["--model", str(qwen3_4b), "--gpu", "H100", "--context", "4096"]
    assert cli.main([*good, *options]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(sentence)
    assert output.err.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "gpt2"}, "is of model_type 'gpt2', whose memory was not looked at"),
        ({"model_type": None}, "is of model_type None"),
        ({"sliding_window": 4096}, "has sliding windows"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "has sliding windows"),
        ({"hidden_size": None}, ": config.json has no hidden_size"),
        ({"intermediate_size": "wide"}, ": config.json has no intermediate_size"),
    ],
)
def test_a_model_it_does_not_know_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    file = write_config(tmp_path, QWEN3_4B | changes)
    assert cli.main(["--model", str(file), "--gpu", "H100", "--context", "4096"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"--model {file}")
    assert sentence in error
    assert error.count("\n") == 1


def test_a_window_that_is_switched_off_is_none(tmp_path: Path) -> None:
    config = QWEN3_4B | {"sliding_window": 32768, "use_sliding_window": False}
    assert model_of(tmp_path, config).hidden == 2560


def test_a_file_that_is_no_config_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    for text in ("{", "[]"):
        file.write_text(text)
        assert cli.main(["--model", str(file), "--gpu", "H100", "--context", "4096"]) == 2
        assert capsys.readouterr().err.startswith(f"--model {file} is no config.json")

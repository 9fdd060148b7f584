"""How a base is found, downloaded and quantized; the trainer and its replicas must agree on it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.boot import one_line
from shared.schemas import QuantizationRecipe

if TYPE_CHECKING:
    from torch import Tensor

# Every file that enters the identity of a base: the identity must not depend on what another tool
# happened to download into the hub's cache.
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*tekken*", "*.tiktoken")


def resolve_checkpoint(
    model: str,
    setting: str = "the model",
    *,
    revision: str | None = None,
    token: str | None = None,
) -> Path:
    """The folder of a checkpoint. `model` is a folder or a hub id, which is downloaded if needed.

    `setting` names the model in errors; `token` overrides HF_TOKEN. Raises ValueError for a model
    that is missing or incomplete, and OSError if the hub does not answer.
    """
    name = f"{setting} {model}"
    folder = Path(model).expanduser()
    try:
        is_here = folder.is_dir()
    except PermissionError as error:
        raise ValueError(_unreadable(name, folder)) from error
    if not is_here:
        if model.startswith((".", "/", "~")):
            raise ValueError(f"{name}: no such folder; name a checkpoint folder or a hub id")
        folder = _download(model, name, revision, token)
    folder = folder.resolve()
    _check_whole(folder, name)
    return folder


def _check_whole(folder: Path, name: str) -> None:
    """Raise ValueError unless the folder has a config, all its weights and a tokenizer."""
    try:
        json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        what = "has no config.json" if any(folder.iterdir()) else "is empty"
        raise ValueError(
            f"{name}: the folder {what}; give the folder of a Hugging Face checkpoint"
        ) from None
    except ValueError as error:
        raise ValueError(
            f"{name}: config.json cannot be read ({one_line(error)}); copy or download it again"
        ) from error
    except PermissionError as error:
        raise ValueError(_unreadable(name, folder)) from error
    present = {path.name for path in folder.glob("*.safetensors")}
    if not present:
        raise ValueError(
            f"{name}: the folder has no *.safetensors files; give a checkpoint in that format"
        )
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.json")):
        if not os.access(path, os.R_OK):
            raise ValueError(_unreadable(name, path))
    for index in folder.glob("*.safetensors.index.json"):
        needed = set(json.loads(index.read_text())["weight_map"].values())
        if missing := sorted(needed - present):
            raise ValueError(
                f"{name}: {len(missing)} of its {len(needed)} weight files are missing, "
                f"for example {missing[0]}; copy or download the checkpoint again"
            )
    if not any(path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)):
        raise ValueError(f"{name}: the folder has no tokenizer; save the tokenizer there too")


def _unreadable(name: str, path: Path) -> str:
    return (
        f"{name}: user {os.getuid()} cannot read {path}; make it readable, for example with "
        "chmod -R a+rX"
    )


def _download(model: str, name: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import constants, get_token, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(model, allow_patterns=_HUB_FILES, revision=revision, token=token)
        )
    except RevisionNotFoundError as error:
        raise ValueError(
            f"{name}: {constants.ENDPOINT}/{model} has no revision {revision!r}; name a "
            "branch, tag or commit of it"
        ) from error
    except HFValidationError as error:
        raise ValueError(
            f"{name}: this is neither a folder nor a hub id such as owner/model"
        ) from error
    except GatedRepoError as error:
        todo = "request access for the HF_TOKEN account" if token or get_token() else "set HF_TOKEN"
        raise ValueError(
            f"{name}: the model is gated; accept its conditions on {constants.ENDPOINT}/{model} "
            f"and {todo}"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{name}: this is neither a local folder nor a model on {constants.ENDPOINT}; check "
            "the name, and HF_TOKEN if the model is private"
        ) from error
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise ValueError(
                f"{name}: the model is not in the cache {constants.HF_HUB_CACHE}, and "
                "HF_HUB_OFFLINE forbids downloading it; unset HF_HUB_OFFLINE, or download the "
                "model into the cache first"
            ) from error
        raise ConnectionError(
            f"{name}: the model is not in the cache {constants.HF_HUB_CACHE}, and "
            f"{constants.ENDPOINT} does not answer ({one_line(error.__cause__ or error)}); check "
            "the network, or name a checkpoint folder"
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise ValueError(
                f"{name}: {constants.ENDPOINT} rejected HF_TOKEN; set a valid token"
            ) from error
        raise ConnectionError(f"{name}: {one_line(error)}") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            what = "is full; enlarge its volume"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR):
            what = f"is not writable ({os.strerror(error.errno)}); mount a volume there that user"
            what += f" {os.getuid()} can write to"
        else:
            raise
        raise ValueError(
            f"{name}: the cache HF_HOME={constants.HF_HOME} {what}, or set HF_HOME to another "
            "folder"
        ) from error


def quantized_load_options(source: Path, device: str) -> dict[str, Any]:
    """Arguments of `AutoModelForCausalLM.from_pretrained` for the 4-bit base of a QLoRA policy.

    A 4-bit checkpoint keeps its stored quantization state.
    """
    import torch
    from transformers import BitsAndBytesConfig

    recipe = QuantizationRecipe()
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": device}}
    if "quantization_config" not in json.loads((source / "config.json").read_text()):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=recipe.quant_type,
            bnb_4bit_use_double_quant=recipe.double_quant,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=list(recipe.skipped_modules),
        )
    return options


def write_dense(
    source: Path,
    target: Path,
    device: str,
    *,
    in_4bit: bool = True,
    change: Callable[[str, Tensor], Tensor] = lambda _, weight: weight,
) -> None:
    """Write the checkpoint `source` to the folder `target` in bf16, with its tokenizer and so on.

    With `in_4bit` the linear weights are first quantized as in a QLoRA policy, then dequantized.
    `change` maps the module path and bf16 weight [out, in] of each linear to the weight to write.
    """
    import bitsandbytes as bnb
    import torch
    from huggingface_hub import save_torch_state_dict
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": device}}
    if in_4bit:
        options = quantized_load_options(source, device)
    model = AutoModelForCausalLM.from_pretrained(source, **options)
    linears = {n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    tensors = {}
    for name, parameter in model.named_parameters():
        plain = parameter.detach()
        if isinstance(parameter, bnb.nn.Params4bit):
            plain = bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state)
        plain = plain.to(torch.bfloat16)
        module, _, leaf = name.rpartition(".")
        if module in linears and leaf == "weight":
            plain = change(module, plain)
        tensors[name] = plain.cpu()
    save_torch_state_dict(tensors, target)

    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    (target / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}, indent=2))
    for file in target.glob("*.safetensors"):  # safetensors writes files that only the owner reads.
        file.chmod((target / "config.json").stat().st_mode)
    for file in source.iterdir():
        is_weight = file.suffix in {".safetensors", ".bin", ".pt"} or ".index." in file.name
        if file.is_file() and not is_weight and file.name != "config.json":
            shutil.copy2(file, target / file.name)

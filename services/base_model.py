"""Where a base comes from and how it is quantized: trainer and replica must do the same."""

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

# Every file whose content enters the identity of a base, so that it does not depend on what
# another tool has left in the hub's cache.
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*tekken*", "*.tiktoken")


def resolve_checkpoint(
    model: str,
    setting: str = "the model",
    *,
    revision: str | None = None,
    token: str | None = None,
) -> Path:
    """The folder of a checkpoint: a local one, or a hub id, downloaded unless HF_HUB_OFFLINE.

    `setting` is what the sentences call it; `token` takes the place of HF_TOKEN. Raises ValueError
    for a model that is not there or not whole, OSError when the hub does not answer.
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
    """Raise ValueError unless the folder has what a checkpoint has."""
    try:
        json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        what = "has no config.json" if any(folder.iterdir()) else "is empty"
        raise ValueError(
            f"{name}: the folder {what}; give that of a Hugging Face checkpoint"
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
            f"{name}: the folder has no *.safetensors; give a checkpoint in that format"
        )
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.json")):
        if not os.access(path, os.R_OK):
            raise ValueError(_unreadable(name, path))
    for index in folder.glob("*.safetensors.index.json"):
        needed = set(json.loads(index.read_text())["weight_map"].values())
        if missing := sorted(needed - present):
            raise ValueError(
                f"{name}: {len(missing)} of its {len(needed)} weight files are missing, "
                f"{missing[0]} for one; copy or download it again"
            )
    if not any(path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)):
        raise ValueError(f"{name}: the folder has no tokenizer; save it there too")


def _unreadable(name: str, path: Path) -> str:
    return f"{name}: user {os.getuid()} may not read {path}; give it to that user, or chmod a+rX"


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
            f"{name}: {constants.ENDPOINT}/{model} has no revision {revision!r}; name a branch, a "
            "tag or a commit of it"
        ) from error
    except HFValidationError as error:
        raise ValueError(f"{name}: neither a folder nor a hub id like owner/model") from error
    except GatedRepoError as error:
        todo = (
            "the owner of HF_TOKEN has to be granted access"
            if token or get_token()
            else "set HF_TOKEN"
        )
        raise ValueError(
            f"{name}: it is gated; {todo}, after accepting its conditions on "
            f"{constants.ENDPOINT}/{model}"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{name}: neither a folder here nor a model of {constants.ENDPOINT}; check the name, "
            "and for a private model HF_TOKEN"
        ) from error
    except LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise ValueError(
                f"{name}: not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids "
                "to download it; unset that, or download the model there first"
            ) from error
        raise ConnectionError(
            f"{name}: not in the cache {constants.HF_HUB_CACHE}, and {constants.ENDPOINT} does not "
            f"answer ({one_line(error.__cause__ or error)}); check the network, or name a "
            "checkpoint folder"
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise ValueError(
                f"{name}: {constants.ENDPOINT} refuses HF_TOKEN; correct it"
            ) from error
        raise ConnectionError(f"{name}: {one_line(error)}") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            what = "is full; give the volume more space"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR):
            what = f"cannot be written ({os.strerror(error.errno)}); mount a volume there that user"
            what += f" {os.getuid()} may write to"
        else:
            raise
        raise ValueError(
            f"{name}: the cache HF_HOME={constants.HF_HOME} {what}, or set HF_HOME"
        ) from error


def quantized_load_options(source: Path, device: str) -> dict[str, Any]:
    """Arguments of `AutoModelForCausalLM.from_pretrained` for the 4-bit base of a QLoRA policy.

    A checkpoint that is already 4-bit keeps its stored quantization state.
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
    """Write `source` to the folder `target` as bf16, tokenizer and all else included.

    With `in_4bit` every linear has passed through the 4-bit weights of a QLoRA policy. `change`
    gets the module path and bf16 weight [out, in] of every linear, and answers what to write.
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
    for file in target.glob("*.safetensors"):  # safetensors lets nobody else read what it writes
        file.chmod((target / "config.json").stat().st_mode)
    for file in source.iterdir():
        is_weight = file.suffix in {".safetensors", ".bin", ".pt"} or ".index." in file.name
        if file.is_file() and not is_weight and file.name != "config.json":
            shutil.copy2(file, target / file.name)

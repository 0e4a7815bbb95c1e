"""Remote code for a checkpoint: a file in its folder that imports this package, or says what to install.

Transformers has no discovery of plug-ins, so a checkpoint of model type "ma2mba" loads only where this package has
been imported. A checkpoint with the shim also loads with `trust_remote_code=True` alone.
"""

import json
import os
from pathlib import Path

SHIM_NAME = "ma2mba_shim.py"

_SHIM = '''\
"""Loads this checkpoint with the package transformers_ma2mba, for `trust_remote_code=True`."""

try:
    from transformers_ma2mba import Ma2mbaConfig, Ma2mbaProcessor
except ModuleNotFoundError as error:
    if error.name != "transformers_ma2mba":
        raise
    raise ImportError(
        "This checkpoint is a Video-Ma²mba, which Transformers loads with the package transformers_ma2mba: run "
        "`pip install .` in a clone of that package, and load the checkpoint again."
    ) from None


class _Loader:
    """Loads an object of a class of the package, without marking the class as remote code.

    Transformers copies the source of marked classes into each folder that they are saved to.
    """

    def __init__(self, loaded_class):
        self.from_pretrained = loaded_class.from_pretrained

    def register_for_auto_class(self, auto_class=None):
        pass


config = _Loader(Ma2mbaConfig)
processor = _Loader(Ma2mbaProcessor)
'''

# The files that name the shim, and their entry. The model needs none: once the configuration is loaded, the package
# has registered its classes with all Auto classes and `pipeline`.
_AUTO_MAPS = {
    "config.json": {"AutoConfig": f"{Path(SHIM_NAME).stem}.config"},
    "processor_config.json": {"AutoProcessor": f"{Path(SHIM_NAME).stem}.processor"},
}


def add_shim(folder: str | os.PathLike):
    """Make a saved checkpoint load with `trust_remote_code=True` where this package is installed but not imported.

    Where the package is not installed, loading raises an `ImportError` that says what to install. The function writes
    `ma2mba_shim.py`, and `auto_map` into `config.json` and `processor_config.json`. A model or processor that is
    loaded from the folder and saved elsewhere does not take the shim along.

    Args:
        folder: a folder with a model in this package's layout, and its processor if it has one.

    Raises:
        ValueError: if the folder holds no such model. Nothing is written.
    """
    folder = Path(folder)
    configs = {name: _read_json(folder / name) for name in _AUTO_MAPS if (folder / name).is_file()}
    model_type = configs.get("config.json", {}).get("model_type")
    if model_type != "ma2mba":
        found = "has no config.json" if "config.json" not in configs else f"holds a {model_type!r} model"
        raise ValueError(
            f"{str(folder)!r} {found}, but the shim is for a saved 'ma2mba' model: convert or build it first."
        )
    _write(folder / SHIM_NAME, _SHIM)
    for name, config in configs.items():
        config["auto_map"] = {**config.get("auto_map", {}), **_AUTO_MAPS[name]}
        _write(folder / name, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no JSON file: {error}. Save the checkpoint again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds no JSON object. Save the checkpoint again.")
    return content


def _write(path: Path, text: str):
    """Replace a file, which is never half-written."""
    new = path.with_name(path.name + ".new")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
